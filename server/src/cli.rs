//! What can be typed: commands, arguments and their help. No behaviour.

mod bench;
mod load;
mod rank;
mod serve;
mod speculation;

pub use bench::{
    BenchArgs, BenchPart, KernelsArgs, MeasuringArgs, OutputFormat, ShapeFormat, SubjectArgs,
    SweepArgs,
};
pub use load::LoadArgs;
pub use rank::RankArgs;
pub use serve::{AccessArgs, ServeArgs, ToolFormat};
pub use speculation::{DraftName, DraftTokens, ModelName, RuleName, SpeculationArgs};

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Runs 4-bit language models from Hugging Face folders.
#[derive(Debug, Parser)]
#[command(name = "foretoken", version, about, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a prompt and stream the text
    Run(RunArgs),
    /// Serve the OpenAI API
    Serve(ServeArgs),
    /// Run prompts with and without a draft and certify that the texts are the same
    Verify(VerifyArgs),
    /// Predict how well drafts suit a model, and what each would gain, best first
    DraftRank(RankArgs),
    /// Write the logits of every position of a token sequence to a safetensors file
    Logits(LogitsArgs),
    /// Show what a model is: architecture, formats, bytes, memory, kernels
    Inspect(InspectArgs),
    /// Measure prefill, decode and verification of a model, or of made-up weights of its sizes
    Bench(Box<BenchArgs>),
    /// Put load on a server of the OpenAI API and tell how long its answers take
    Load(Box<LoadArgs>),
    /// Show what this machine offers, with its read bandwidth measured now
    Devices(DevicesArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// The command as clap knows it, for completion scripts.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// A model folder (or `demo`, `demo-draft`; default `demo`) and the text to
    /// continue. One argument that is no folder is the prompt; without one it is read from
    /// standard input
    #[arg(value_names = ["MODEL", "PROMPT"], num_args = 0..=2)]
    pub model_and_prompt: Vec<String>,
    /// Treat the prompt as a user message and apply the model's chat template
    #[arg(long)]
    pub chat: bool,
    /// System message for --chat
    #[arg(long, requires = "chat")]
    pub system: Option<String>,
    /// Token ids to continue, in place of a prompt
    #[arg(long, value_delimiter = ',')]
    pub ids: Option<Vec<u32>>,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128)]
    pub max_tokens: u32,
    /// Go on to the token limit even if the model ends its text
    #[arg(long)]
    pub ignore_eos: bool,
    /// Text that ends the generation; may be repeated
    #[arg(long)]
    pub stop: Vec<String>,
    /// Sampling parameters.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Guessing ahead.
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Generate once more without the draft, report both speeds, and fail if the texts differ
    #[arg(long)]
    pub compare: bool,
    /// Colour tokens by how they came about: drafted green, corrected red, bonus blue. Text is
    /// coloured by the token that completed it; needs a terminal, whatever NO_COLOR says
    #[arg(long, conflicts_with = "json")]
    pub show_draft: bool,
    /// Print one JSON object with ids, text, finish_reason, timings and speculation
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Model folder, `demo` or `demo-draft`; default `demo`
    pub model: Option<String>,
    /// Guessing ahead; 4 tokens a cycle if not said otherwise.
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// File with a prompt a line: plain text, a JSON string, {"prompt": TEXT} or {"ids": [...]};
    /// what begins like JSON must be JSON. Default: a few beginnings of Rust source
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Token ids of the only prompt
    #[arg(long, value_delimiter = ',', conflicts_with = "prompts")]
    pub ids: Option<Vec<u32>>,
    /// Most tokens to generate for a prompt
    #[arg(long, default_value_t = 64)]
    pub max_tokens: u32,
    /// Sampling parameters.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Sampling parameters by their API names.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Keep tokens at least this many times as likely as the likeliest
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Mass of locally typical sampling; 1 is off
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen before; 1 is off
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit once for each time it was generated
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Subtracted from the logits of tokens that were generated
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// ID:BIAS, added to the logit of token ID; may be repeated
    #[arg(long, value_parser = parse_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, Args)]
pub struct DeviceArgs {
    /// Device to run on: cpu, cuda (or cuda:1, ...), reference
    #[arg(long, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Threads of the cpu device; default: all cores
    #[arg(long)]
    pub threads: Option<usize>,
    /// Instruction set of the cpu device; default: the best this machine has
    #[arg(long, value_enum)]
    pub cpu_isa: Option<IsaName>,
    /// Format of the head's matrix; default: auto, for logits keep
    #[arg(long, value_enum)]
    pub head: Option<HeadName>,
}

/// Devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceName {
    /// Fast kernels with int8 activations.
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
    /// The scalar specification in f32 and f64: exact and slow.
    Reference,
}

impl std::str::FromStr for DeviceName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let numbered = |number: &str| number.parse().ok().map(Self::Cuda);
        match name {
            "cpu" => Ok(Self::Cpu),
            "reference" => Ok(Self::Reference),
            "cuda" => Ok(Self::Cuda(0)),
            _ => name
                .strip_prefix("cuda:")
                .and_then(numbered)
                .ok_or_else(|| "expected cpu, cuda, cuda:N or reference".to_owned()),
        }
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Reference => f.write_str("reference"),
        }
    }
}

/// Formats of the head's matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HeadName {
    /// int8 on the cpu device if the model's layers are quantized, else keep.
    Auto,
    /// As the model's files have it.
    Keep,
    /// int8 where the files have floats: half the bytes, rounded by at most 1/254 of a group's
    /// greatest weight.
    Int8,
}

/// Instruction sets of the cpu device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IsaName {
    /// Portable code.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX-512 with VNNI, and AMX int8 tiles where a step has many tokens.
    Amx,
}

/// Arguments of `logits`.
#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// Model folder, `demo` or `demo-draft`
    pub model: String,
    /// Token ids
    #[arg(long, value_delimiter = ',', required = true)]
    pub ids: Vec<u32>,
    /// Device.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// File to write: one float32 tensor `logits` of shape [t, v]
    #[arg(long)]
    pub out: PathBuf,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Model folder, `demo` or `demo-draft`
    pub model: String,
    /// Format of the head's matrix, as for run
    #[arg(long, value_enum, default_value_t = HeadName::Auto)]
    pub head: HeadName,
    /// Print every step of the program with its shapes and bytes
    #[arg(long)]
    pub plan: bool,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `devices`.
#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parts = text.split_once(':').and_then(|(id, bias)| {
        let id = id.trim().parse().ok()?;
        Some((id, bias.trim().parse::<f32>().ok().filter(|b| !b.is_nan())?))
    });
    parts.ok_or_else(|| format!("{text} is not ID:BIAS, such as 42:-1.5"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_tree_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn bias_needs_an_id_and_a_number() {
        assert_eq!(parse_bias("42:-1.5"), Ok((42, -1.5)));
        assert!(parse_bias("42").is_err());
        assert!(parse_bias("42:NaN").is_err());
    }
}
