//! What can be typed after `foretoken bench`. No behaviour.

use super::speculation::{draft, draft_tokens};
use super::{DeviceName, DraftName, DraftTokens, HeadName, IsaName};
use clap::{Args, Subcommand, ValueEnum};
use engine::families::shapes::SHAPES;
use std::path::PathBuf;

/// Arguments of `bench`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    /// A part to measure alone; none measures whole steps.
    #[command(subcommand)]
    pub part: Option<BenchPart>,
    /// What to measure.
    #[command(flatten)]
    pub subject: SubjectArgs,
    /// Prompt lengths of the prefill tests, comma separated; 0 for none
    #[arg(short, long, value_delimiter = ',', default_value = "512", value_parser = tokens)]
    pub prompt_tokens: Vec<usize>,
    /// Tokens generated in the decode tests, comma separated; 0 for none
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "128", value_parser = tokens)]
    pub gen_tokens: Vec<usize>,
    /// Tokens in the KV cache before the timed part, comma separated; may exceed the context the
    /// model was trained for, since only time is measured
    #[arg(short, long, value_delimiter = ',', default_value = "0", value_parser = tokens)]
    pub depth: Vec<usize>,
    /// Sequences decoded at once, comma separated
    #[arg(short, long, value_delimiter = ',', default_value = "1", value_parser = count)]
    pub batch: Vec<usize>,
    /// Rows of one sequence that a step verifies, comma separated: T(M) / T(1) of whole steps
    #[arg(long, value_delimiter = ',', value_parser = count)]
    pub verify: Vec<usize>,
    /// Timed repetitions of a test, after one to warm up
    #[arg(short, long, default_value_t = 5, value_parser = repetitions)]
    pub repetitions: usize,
    /// Guessing ahead.
    #[command(flatten)]
    pub sweep: SweepArgs,
    /// How to measure.
    #[command(flatten)]
    pub measuring: MeasuringArgs,
}

/// Draft lengths beside plain decoding.
#[derive(Debug, Args)]
pub struct SweepArgs {
    /// Measure this draft (as for run) with every length of --draft-tokens, in turns with plain
    /// decoding; nothing else is measured then
    #[arg(long, value_name = "DRAFT", value_parser = draft, group = "drafter",
          conflicts_with_all = ["prompt_tokens", "depth", "batch", "verify", "shape"])]
    pub draft: Option<DraftName>,
    /// For --shape: sizes of the draft, those of a published model or of demo-draft, made up over
    /// the shape's vocabulary
    #[arg(long, value_name = "NAME", group = "drafter", requires = "shape", requires = "acceptance",
          conflicts_with_all = ["prompt_tokens", "depth", "batch", "verify"])]
    pub draft_shape: Option<String>,
    /// Draft lengths, comma separated: numbers in 1..=64, or auto
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2,4,8,auto",
          requires = "drafter", value_parser = draft_length)]
    pub draft_tokens: Vec<DraftTokens>,
    /// What if this share of the proposed tokens were right (0 to 1): each one is accepted with
    /// this probability, whatever it is. Every row says that it is simulated
    #[arg(long, value_name = "A", requires = "drafter", value_parser = share)]
    pub acceptance: Option<f64>,
    /// File with a prompt a line, as for verify; default: a few beginnings of Rust source
    #[arg(long, value_name = "FILE", requires = "draft")]
    pub prompts: Option<PathBuf>,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", requires = "drafter", default_value_t = 0.0)]
    pub temperature: f64,
}

/// Parts that are measured alone.
#[derive(Debug, Subcommand)]
pub enum BenchPart {
    /// Measure every distinct linear of a model alone: GB/s of one row and what more rows cost
    Kernels(KernelsArgs),
}

/// Arguments of `bench kernels`.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// What to measure.
    #[command(flatten)]
    pub subject: SubjectArgs,
    /// Rounds over all row counts, after one to warm up; the least time of each counts
    #[arg(short, long, default_value_t = 20, value_parser = repetitions)]
    pub repetitions: usize,
    /// MiB that the copies of a matrix fill together: more than the caches hold measures them
    /// from memory, less from the caches
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = count)]
    pub footprint: usize,
    /// How to measure.
    #[command(flatten)]
    pub measuring: MeasuringArgs,
}

/// Whose sizes are measured.
#[derive(Debug, Args)]
pub struct SubjectArgs {
    /// Model folder, `demo` or `demo-draft`; default `demo`
    pub model: Option<String>,
    /// A published model's sizes with made-up weights.
    #[arg(long, value_name = "NAME", conflicts_with = "model", help = shape_help())]
    pub shape: Option<String>,
    /// Format of the linears of a shape
    #[arg(long, value_enum, default_value_t = ShapeFormat::GptqG128, requires = "shape")]
    pub format: ShapeFormat,
    /// Format of the head's matrix, as for run
    #[arg(long, value_enum, default_value_t = HeadName::Auto)]
    pub head: HeadName,
}

fn shape_help() -> String {
    let names: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
    format!(
        "A published model's sizes with made-up weights in place of a model: {}",
        names.join(", ")
    )
}

/// Where and how often.
#[derive(Debug, Args)]
pub struct MeasuringArgs {
    /// Thread counts of the cpu device, comma separated; default: all cores, even for small models
    #[arg(short, long, value_delimiter = ',', value_parser = count)]
    pub threads: Vec<usize>,
    /// Instruction set of the cpu device; default: the best this machine has
    #[arg(long, value_enum)]
    pub cpu_isa: Option<IsaName>,
    /// Device to run on
    #[arg(long, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
    /// Most of the machine, in percent of its processor time, that other processes may use during
    /// a repetition; louder ones are dropped and repeated, up to three times as many in all
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, value_parser = percent)]
    pub max_foreign: f64,
    /// Form of the rows
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Md)]
    pub output: OutputFormat,
}

/// Formats of the linears of a made-up model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ShapeFormat {
    /// 4-bit codes in groups of 128, symmetric
    GptqG128,
    /// 4-bit codes in groups of 64, symmetric
    GptqG64,
    /// 4-bit codes in groups of 32, symmetric
    GptqG32,
    /// Floats of 16 bits
    F16,
}

/// Forms of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// A Markdown table of the main figures
    Md,
    /// Comma separated values, all figures
    Csv,
    /// One array of objects, all figures
    Json,
    /// One object a line, all figures
    Jsonl,
    /// CREATE TABLE and INSERT statements, all figures
    Sql,
}

/// Positions that a test may ask for: far beyond any context, yet no overflow.
const MOST_TOKENS: usize = 1 << 20;
/// Sequences or rows of a step, threads, or MiB.
const MOST: usize = 1 << 10;

fn within(text: &str, least: usize, most: usize) -> Result<usize, String> {
    let value = text.trim().parse().ok().filter(|value| (least..=most).contains(value));
    value.ok_or_else(|| format!("expected a number in {least}..={most}"))
}

fn tokens(text: &str) -> Result<usize, String> {
    within(text, 0, MOST_TOKENS)
}

fn count(text: &str) -> Result<usize, String> {
    within(text, 1, MOST)
}

fn repetitions(text: &str) -> Result<usize, String> {
    within(text, 1, 1000)
}

fn share(text: &str) -> Result<f64, String> {
    let value = text.trim().parse().ok().filter(|value| (0.0..=1.0).contains(value));
    value.ok_or_else(|| "expected a number in 0..=1".to_owned())
}

fn draft_length(text: &str) -> Result<DraftTokens, String> {
    match draft_tokens(text) {
        Ok(DraftTokens::Off) | Err(_) => {
            Err("expected auto or numbers in 1..=64; plain decoding is always measured".to_owned())
        }
        length => length,
    }
}

fn percent(text: &str) -> Result<f64, String> {
    let value = text.trim().parse().ok().filter(|value| (0.0..=100.0).contains(value));
    value.ok_or_else(|| "expected a number in 0..=100".to_owned())
}

#[cfg(test)]
mod tests {
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn parse(words: &[&str]) -> Result<Command, String> {
        let words = ["foretoken", "bench"].iter().chain(words);
        Cli::try_parse_from(words).map(|cli| cli.command).map_err(|e| e.to_string())
    }

    #[test]
    fn lists_are_split_at_commas() {
        let words = ["-p", "16,32", "-n", "0", "-d", "0,64", "-b", "1,4", "-t", "1,2"];
        let Ok(Command::Bench(args)) = parse(&words) else { panic!("these are arguments") };
        assert_eq!((args.prompt_tokens, args.gen_tokens), (vec![16, 32], vec![0]));
        assert_eq!((args.depth, args.batch), (vec![0, 64], vec![1, 4]));
        assert_eq!(args.measuring.threads, [1, 2]);
        assert_eq!((args.repetitions, args.verify), (5, vec![]));
    }

    #[test]
    fn kernels_is_a_command_of_its_own() {
        let words = ["kernels", "--shape", "tinyllama-1.1b", "-r", "3"];
        let Ok(Command::Bench(args)) = parse(&words) else { panic!("these are arguments") };
        let Some(super::BenchPart::Kernels(kernels)) = args.part else { panic!("a part") };
        assert_eq!(kernels.subject.shape.as_deref(), Some("tinyllama-1.1b"));
        assert_eq!(kernels.repetitions, 3);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (words, part) in [
            (&["demo", "--shape", "phi-4"][..], "cannot be used with"),
            (&["--format", "f16"], "--shape"),
            (&["-b", "0"], "1..=1024"),
            (&["-p", "x"], "0..=1048576"),
            (&["--max-foreign", "NaN"], "0..=100"),
            (&["-o", "xml"], "jsonl"),
            (&["--draft-tokens", "2"], "--draft"),
            (&["--acceptance", "0.8"], "--draft"),
            (&["--draft", "lookup", "--acceptance", "1.1"], "0..=1"),
            (&["--draft", "lookup", "--draft-tokens", "2,off"], "1..=64"),
            (&["--draft", "lookup", "-p", "9"], "cannot be used with"),
            (&["--draft", "lookup", "--shape", "phi-4"], "cannot be used with"),
            (&["--shape", "phi-4", "--draft-shape", "demo-draft"], "--acceptance"),
        ] {
            let refused = parse(words).unwrap_err();
            assert!(refused.contains(part), "{words:?}: {refused}");
        }
    }
}
