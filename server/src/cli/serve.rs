//! What can be typed after `foretoken serve`. No behaviour.

use super::{DeviceArgs, SpeculationArgs};
use clap::{Args, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Model folder, `demo` or `demo-draft`; default `demo`, with its draft
    pub model: Option<String>,
    /// Name of the model for clients; default: the folder's name
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// File with the Jinja template of chats; default: the model's own
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Form in which the model calls tools; default: the one that the template shows
    #[arg(long, value_name = "FORM")]
    pub tool_format: Option<ToolFormat>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// Most requests that are computed at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub max_running: u32,
    /// Most requests that wait beside them; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(0..=65536))]
    pub max_queue: u32,
    /// Tokens for which keys and values are kept; default: what --max-running contexts need, at
    /// most half of the free memory
    #[arg(long, value_name = "N")]
    pub kv_tokens: Option<usize>,
    /// Compute every prompt from its first token on: by default, requests that begin alike share
    /// keys and values of what they have in common
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Seconds that open requests may go on after SIGTERM or ctrl-c
    #[arg(long, value_name = "S", default_value_t = 30)]
    pub drain_seconds: u64,
    /// Seconds after which a request is given up, its waiting included; 0 never does
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub request_seconds: u64,
    /// Who may listen and call.
    #[command(flatten)]
    pub access: AccessArgs,
    /// Guessing ahead.
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// Device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Forms in which models call tools, by those that brought them up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ToolFormat {
    /// `<tool_call>{json}</tool_call>`; also Qwen
    Hermes,
    /// `{json}` as the whole answer
    Llama3,
    /// `[TOOL_CALLS][{json}, ...]` or `[TOOL_CALLS]name[ARGS]{json}`
    Mistral,
}

/// Who may call a server, and by what.
#[derive(Debug, Args)]
pub struct AccessArgs {
    /// Key that clients must send as `Authorization: Bearer KEY`; may be repeated
    #[arg(long, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// File with a key a line; lines that begin with # are none
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Listen on an address that others can reach though no key is asked for
    #[arg(long)]
    pub allow_public: bool,
    /// Origin of web pages that may call, such as `https://example.org`, or `*`; may be repeated
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// Name by which clients may ask for this server where no key is asked for, beside `localhost`
    /// and addresses; may be repeated
    #[arg(long, value_name = "NAME")]
    pub allowed_host: Vec<String>,
    /// Most open connections; more wait until one is closed
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_connections: u32,
    /// Seconds that a connection may take to begin its first request, or its next one
    #[arg(long, value_name = "S", default_value_t = 75, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub idle_seconds: u64,
    /// Most bytes of a request's body
    #[arg(long, value_name = "N", default_value_t = 4 << 20)]
    pub max_body_bytes: usize,
}
