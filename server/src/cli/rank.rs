//! What can be typed after `foretoken draft-rank`. No behaviour.

use super::speculation::draft_model;
use super::{DeviceArgs, ModelName, RuleName, SamplingArgs};
use clap::Args;
use std::path::PathBuf;

/// Arguments of `draft-rank`.
#[derive(Debug, Args)]
#[command(mut_arg("temperature", |arg| arg.default_value("1")))]
pub struct RankArgs {
    /// The model that drafts are to guess for: a folder, `demo` or `demo-draft`
    pub target: String,
    /// The drafts, as --draft of `run` names models: DIR, demo-draft, self:layers=N, self:bits=4
    #[arg(long, value_name = "DRAFT", num_args = 1.., required = true, value_parser = draft_model)]
    pub drafts: Vec<ModelName>,
    /// File with a prompt a line, as for `verify`; {"prompt": TEXT, "category": NAME} also says
    /// what kind of prompt it is. Default: beginnings of Rust source of four kinds
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Tokens by which the target continues each prompt, with the given sampling parameters and
    /// the seed plus the prompt's number from 0; these are what the drafts are tried on. 0 tries
    /// them on the prompts themselves
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub generate: u32,
    /// The rule by whose speed-up drafts are ordered
    #[arg(long, value_enum, default_value_t = RuleName::Coupled)]
    pub acceptance_rule: RuleName,
    /// Sampling parameters, of which the predictions are true.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Also show acceptance by category and by distance from the text's beginning
    #[arg(long)]
    pub details: bool,
    /// Print one JSON object, with all details
    #[arg(long)]
    pub json: bool,
}
