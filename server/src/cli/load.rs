//! What can be typed after `foretoken load`. No behaviour.

use clap::Args;
use std::path::PathBuf;

/// Arguments of `load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The server; `/v1` at its end may be left out
    #[arg(default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// Name of the model in requests; default: the first one that the server lists
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Key, sent as `Authorization: Bearer KEY`
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Requests that are open at once: as one ends, the next begins
    #[arg(long, value_name = "N", default_value_t = 16, conflicts_with = "trace", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub streams: u32,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, conflicts_with = "trace", value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: u32,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64, conflicts_with = "trace", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as of the Azure LLM
    /// inference traces: each request is sent at its time, however many are open
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Multiplies the times between a trace's requests
    #[arg(long, value_name = "F", default_value_t = 1.0, requires = "trace", value_parser = positive)]
    pub stretch: f64,
    /// Divides the numbers of tokens of a trace's requests
    #[arg(long, value_name = "D", default_value_t = 1.0, requires = "trace", value_parser = positive)]
    pub shrink: f64,
    /// Seconds after which no request begins; default 10, for a trace its whole length
    #[arg(long, value_name = "S", value_parser = positive)]
    pub seconds: Option<f64>,
    /// Most requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,
    /// Sampling temperature; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Decides the prompts' tokens. A server that keeps what it computed answers the same prompts
    /// faster the second time; default: another one each time
    #[arg(long)]
    pub seed: Option<u64>,
    /// Prompts are of token ids below this; default: what `/tokenizer_info` says, else 1000
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub vocab: Option<u32>,
    /// Most tokens of prompt and answer together; default: what `/v1/models` says, else no limit
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub context: Option<u32>,
    /// Objective in milliseconds: time to the first token
    #[arg(long, value_name = "MS", value_parser = positive)]
    pub slo_ttft: Option<f64>,
    /// Objective in milliseconds: time per token after the first
    #[arg(long, value_name = "MS", value_parser = positive)]
    pub slo_itl: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
    number.ok_or_else(|| format!("{text} is not a number above 0"))
}
