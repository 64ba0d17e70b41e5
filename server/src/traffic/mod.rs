//! `foretoken load`: requests to a server of the OpenAI API, and how long their answers took.
//!
//! Prompts are random token ids, so no tokenizer is needed and no two prompts begin alike. Requests
//! come from a fixed number of streams ([`Plan::Streams`]) or at the times of a recorded trace
//! ([`trace`]). Not here: how fast a model is without a server ([`crate::bench`]).

mod books;
mod client;
mod summary;
mod trace;

use crate::Io;
use crate::cli::LoadArgs;
use crate::load::Unexpected;
use anyhow::{Context, bail};
use axum::http::StatusCode;
use books::Books;
use client::Client;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use summary::{Objectives, Outcome, Summary};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use trace::{Arrival, Recording, Scale};

/// Length of a load where nobody says it.
const SECONDS: f64 = 10.0;
/// Token ids that every vocabulary of a language model has.
const VOCAB: u32 = 1000;
/// Lower ids are often special.
const LOWEST_ID: u32 = 100;
/// Before a stream tries again after a failure.
const RETRY: Duration = Duration::from_millis(100);

/// Runs the command.
pub(crate) fn run(args: &LoadArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    // One thread: the machine may be the server's, too.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a thread that speaks HTTP")?;
    let client = Client::new(&args.url, args.api_key.as_deref())?;
    let recording = args.trace.as_deref().map(read).transpose()?;
    let (subject, plan) = runtime.block_on(async {
        let subject = Subject::ask(client, args).await?;
        let plan = Plan::new(args, recording.as_ref(), subject.context)?;
        anyhow::Ok((Arc::new(subject), plan))
    })?;
    writeln!(io.err, "foretoken: {}", plan.describe(&subject))?;
    let summary = runtime.block_on(drive(&subject, &plan, objectives(args)));
    if args.json {
        let mut object = json!(summary);
        object["url"] = json!(subject.client.root());
        object["model"] = json!(subject.model);
        object["seed"] = json!(subject.seed);
        writeln!(io.out, "{object}")?;
    } else {
        summary.write(io.out)?;
    }
    match summary.failed.values().next() {
        Some(first) if summary.answered == 0 => {
            let reason = anyhow::anyhow!("no request was answered: {}", first.reason);
            Err(reason.context(Unexpected))
        }
        _ => Ok(()),
    }
}

/// A trace, in words why it cannot be read.
fn read(path: &Path) -> anyhow::Result<Recording> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
    Recording::parse(&text).with_context(|| shown.to_string())
}

fn objectives(args: &LoadArgs) -> Objectives {
    Objectives { ttft_ms: args.slo_ttft, itl_ms: args.slo_itl }
}

/// A server, and what its requests have in common.
#[derive(Debug)]
struct Subject {
    client: Client,
    model: String,
    context: Option<u32>,
    vocab: u32,
    temperature: f32,
    seed: u64,
}

impl Subject {
    /// Asks the server what it serves.
    async fn ask(client: Client, args: &LoadArgs) -> anyhow::Result<Self> {
        let (status, text) = client.get("/v1/models").await?;
        let card = match (status, &args.model) {
            (StatusCode::OK, _) => card(&text, args.model.as_deref()),
            // Some servers do not list their models.
            (StatusCode::NOT_FOUND, Some(_)) => None,
            _ => bail!(
                "{} answers {status} to /v1/models, as if it served no model: {}",
                client.root(),
                client::reason(&text)
            ),
        };
        let listed = card.as_ref().and_then(|card| card["id"].as_str()).map(str::to_owned);
        let model = args.model.clone().or(listed);
        let model = model.context("the server lists no model: name one by --model")?;
        let length = card.as_ref().and_then(|card| card["max_model_len"].as_u64());
        let context = args.context.or(length.and_then(|length| length.try_into().ok()));
        let vocab = match args.vocab {
            Some(vocab) => vocab,
            None => vocab(&client).await.unwrap_or(VOCAB),
        };
        let seed = args.seed.unwrap_or_else(clock);
        Ok(Self { client, model, context, vocab, temperature: args.temperature, seed })
    }

    /// Sends request `number`.
    async fn request(&self, number: u64, prompt_tokens: u32, max_tokens: u32) -> Outcome {
        let body = json!({
            "model": self.model,
            "prompt": self.prompt(number, prompt_tokens),
            "max_tokens": max_tokens,
            // All answers have the length that was asked for.
            "ignore_eos": true,
            "temperature": self.temperature,
            "seed": number,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let result = self.client.complete(body.to_string()).await;
        Outcome { prompt_tokens, result }
    }

    fn prompt(&self, number: u64, tokens: u32) -> Vec<u32> {
        let lowest = LOWEST_ID.min(self.vocab - 1);
        let first = mixed(self.seed ^ mixed(number));
        let id = |i: u32| {
            let ids = u64::from(self.vocab - lowest);
            lowest + (mixed(first.wrapping_add(u64::from(i))) % ids) as u32
        };
        (0..tokens).map(id).collect()
    }
}

/// What a list of models says of one of them, or of the first.
fn card(list: &str, name: Option<&str>) -> Option<Value> {
    let list: Value = serde_json::from_str(list).ok()?;
    let mut cards = list["data"].as_array()?.iter();
    cards.find(|card| name.is_none_or(|name| card["id"] == name)).cloned()
}

/// Number of tokens of the server's vocabulary, if it says so.
async fn vocab(client: &Client) -> Option<u32> {
    let (status, text) = client.get("/tokenizer_info").await.ok()?;
    let info: Value = (status == StatusCode::OK).then(|| serde_json::from_str(&text).ok())??;
    info["vocab_size"].as_u64()?.try_into().ok().filter(|size| *size > 0)
}

fn clock() -> u64 {
    // A small number, so that it can be typed again.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() % 1_000_000)
}

/// The finalizer of splitmix64 (Steele et al., OOPSLA 2014): neighbours become unlike.
fn mixed(number: u64) -> u64 {
    let z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Which requests are sent when.
#[derive(Debug)]
enum Plan {
    /// So many at once, each followed by the next.
    Streams { streams: u32, prompt_tokens: u32, max_tokens: u32, seconds: f64, requests: u64 },
    /// Each at its time.
    Trace { arrivals: Vec<Arrival>, said: String },
}

impl Plan {
    fn new(
        args: &LoadArgs,
        recording: Option<&Recording>,
        context: Option<u32>,
    ) -> anyhow::Result<Self> {
        if let Some(recording) = recording {
            return Self::of_trace(recording, args, context);
        }
        let (prompt_tokens, max_tokens) = (args.prompt_tokens, args.max_tokens);
        let all = prompt_tokens.saturating_add(max_tokens);
        if let Some(context) = context.filter(|context| all > *context) {
            bail!(
                "--prompt-tokens {prompt_tokens} and --max-tokens {max_tokens} are {all} together, more than the context of {context}"
            );
        }
        let (streams, requests) = (args.streams, args.requests.unwrap_or(u64::MAX));
        // Who says how many requests is not told when to stop.
        let default = if args.requests.is_some() { f64::MAX } else { SECONDS };
        let seconds = args.seconds.unwrap_or(default);
        Ok(Self::Streams { streams, prompt_tokens, max_tokens, seconds, requests })
    }

    fn of_trace(
        recording: &Recording,
        args: &LoadArgs,
        context: Option<u32>,
    ) -> anyhow::Result<Self> {
        let scale = Scale { stretch: args.stretch, shrink: args.shrink, context };
        let whole = recording.scaled(&scale)?;
        let (all, mut arrivals) = (whole.arrivals.len(), whole.arrivals);
        let seconds = args.seconds.unwrap_or(f64::MAX);
        arrivals.retain(|arrival| arrival.at.as_secs_f64() < seconds);
        arrivals.truncate(args.requests.map_or(usize::MAX, |n| n as usize));
        let mut said = format!("{} of the trace's {all} requests", arrivals.len());
        if whole.cut > 0 {
            let context = context.unwrap_or(u32::MAX);
            said += &format!(
                "; of all of them, {} are cut to the context of {context} and lose {} tokens",
                whole.cut, whole.cut_tokens
            );
        }
        Ok(Self::Trace { arrivals, said })
    }

    fn describe(&self, subject: &Subject) -> String {
        let what = match self {
            Self::Trace { said, .. } => said.clone(),
            Self::Streams { streams, prompt_tokens, max_tokens, .. } => {
                format!("{streams} streams of {prompt_tokens} + {max_tokens} tokens")
            }
        };
        let Subject { client, model, seed, vocab, .. } = subject;
        format!("{what}; {model} at {}, ids below {vocab}, --seed {seed}", client.root())
    }
}

/// Sends all requests of the plan and waits for their ends.
async fn drive(subject: &Arc<Subject>, plan: &Plan, wanted: Objectives) -> Summary {
    let before = Books::of(&subject.client).await;
    let start = Instant::now();
    let outcomes = match plan {
        Plan::Trace { arrivals, .. } => replay(subject, arrivals, start).await,
        Plan::Streams { streams, prompt_tokens, max_tokens, seconds, requests } => {
            let lengths = (*prompt_tokens, *max_tokens);
            let limits = (*seconds, *requests);
            repeat(subject, *streams, lengths, limits, start).await
        }
    };
    let mut summary = Summary::new(&outcomes, start.elapsed(), wanted);
    if let (Some(before), Some(after)) = (before, Books::of(&subject.client).await) {
        summary.server = after.since(before);
    }
    summary
}

/// Sends each request at its time, however many are open.
async fn replay(subject: &Arc<Subject>, arrivals: &[Arrival], start: Instant) -> Vec<Outcome> {
    let mut open = JoinSet::new();
    for (number, arrival) in arrivals.iter().copied().enumerate() {
        sleep_until(start + arrival.at).await;
        let subject = subject.clone();
        open.spawn(async move {
            subject.request(number as u64, arrival.prompt_tokens, arrival.max_tokens).await
        });
    }
    open.join_all().await
}

/// Keeps `streams` requests open until so many seconds are over or so many requests were sent.
async fn repeat(
    subject: &Arc<Subject>,
    streams: u32,
    (prompt_tokens, max_tokens): (u32, u32),
    (seconds, requests): (f64, u64),
    start: Instant,
) -> Vec<Outcome> {
    let sent = Arc::new(AtomicU64::new(0));
    let mut open = JoinSet::new();
    for _ in 0..streams {
        let (subject, sent) = (subject.clone(), sent.clone());
        open.spawn(async move {
            let mut outcomes = vec![];
            while start.elapsed().as_secs_f64() < seconds {
                let number = sent.fetch_add(1, Ordering::Relaxed);
                if number >= requests {
                    break;
                }
                let outcome = subject.request(number, prompt_tokens, max_tokens).await;
                if outcome.result.is_err() {
                    sleep(RETRY).await;
                }
                outcomes.push(outcome);
            }
            outcomes
        });
    }
    open.join_all().await.into_iter().flatten().collect()
}
