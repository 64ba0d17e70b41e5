//! `foretoken serve`: the OpenAI API over one engine.
//!
//! ```text
//! tokio threads: HTTP ── handler ── Generation ◀─ Updates ─┐ per request, never full
//!                            └───────── Handle ─ Command ──▶ worker ── Engine   (this thread)
//! ```
//! The address opens first, then the model loads, then this thread becomes the engine's. Not here:
//! one prompt at a terminal ([`crate::run`]).

mod access;
#[cfg(test)]
mod access_tests;
mod app;
#[cfg(test)]
mod chat_tests;
mod error;
mod extract;
mod generation;
mod guides;
mod hosts;
mod listen;
mod metrics;
#[cfg(test)]
mod metrics_tests;
mod openai;
mod openapi;
mod page;
#[cfg(test)]
mod report_tests;
mod routes;
mod sse;
#[cfg(test)]
mod structured_tests;
#[cfg(test)]
mod tests;
mod tokens;
mod worker;

use crate::Io;
use crate::bench::machine;
use crate::cli::{DeviceName, HeadName, ServeArgs, ToolFormat};
use crate::speculate::Draft;
use crate::{generate, load, run};
use access::Access;
use anyhow::{Context, bail};
use app::{App, Served};
use engine::chat::ChatTemplate;
use engine::engine::{Engine, EngineConfig};
use engine::kv::{BLOCK_LEN, PrefixCaching};
use engine::model::Model;
use engine::tokenizer::Tokenizer;
use guides::Guides;
use kernels::program::{Program, TokenId};
use kernels::{StepLimits, cuda};
use listen::Limits;
use metrics::Metrics;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Most threads that speak HTTP; the engine has its own.
const HTTP_THREADS: usize = 4;
/// Prompt tokens of a step whose probabilities may be wanted.
const MAX_SCORED: usize = 64;
/// After the last answer, time for it to reach its client.
const FAREWELL: Duration = Duration::from_secs(2);

/// Runs the command until it is told to stop.
pub(crate) fn run(args: &ServeArgs, io: &mut Io<'_>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(http_threads())
        .enable_all()
        .build()
        .context("cannot start the threads that speak HTTP")?;
    let access = Access::new(&args.access)?;
    if let Some(warning) = access.check_host(args.host, &args.access)? {
        writeln!(io.err, "foretoken: {warning}")?;
    }
    let listener = bind(args, &runtime)?;
    let address = listener.local_addr().context("the socket has no address")?;
    let metrics = Arc::new(Metrics::new()?);
    let (handle, inbox) = worker::channel();
    let app = Arc::new(App::new(handle, metrics.clone()));
    let router = access.guard(routes::router(app.clone()), metrics.clone());
    let limits = Limits::new(&args.access);
    let server = runtime.spawn(listen::serve(listener, router, limits, stop(app.clone())));
    writeln!(io.err, "foretoken: http://{address} is open; loading the model")?;
    let (engine, served) = load(args, io)?;
    let name = served.name.clone();
    app.serve(served);
    writeln!(io.err, "foretoken: {name} is served at http://{address}")?;
    worker::run(engine, inbox, &metrics, Duration::from_secs(args.drain_seconds));
    app.stop();
    // Who is still connected then keeps nobody from ending.
    let _ = runtime.block_on(async { tokio::time::timeout(FAREWELL, server).await });
    runtime.shutdown_background();
    Ok(())
}

/// One for each four processors: on a small machine more of them would take turns with the engine.
fn http_threads() -> usize {
    (kernels::cpu::available_threads() / 4).clamp(1, HTTP_THREADS)
}

fn bind(args: &ServeArgs, runtime: &Runtime) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::new(args.host, args.port);
    let listener = runtime.block_on(TcpListener::bind(address));
    listener.with_context(|| format!("cannot listen on {address}: choose another --port or --host"))
}

/// Comes when the process is told to stop and no more requests are taken.
async fn stop(app: Arc<App>) {
    told_to_stop().await;
    app.stop();
    app.handle.stop().await;
}

/// Waits for ctrl-c or SIGTERM.
async fn told_to_stop() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// The engine, and what clients see of its model.
fn load(args: &ServeArgs, io: &mut Io<'_>) -> anyhow::Result<(Engine, Served)> {
    let name = args.model.as_deref().unwrap_or("demo");
    let head = load::head(args.device.head.unwrap_or(HeadName::Auto), args.device.device);
    let model = load::open(name, head)?;
    let draft = Draft::open(&args.speculation, &model, args.model.is_some(), &args.device)?;
    let tokenizer = run::tokenizer(&model, false)?.context("a server needs a tokenizer")?;
    let template = template(args.chat_template.as_deref(), &model)?;
    let config = config(args, &model, draft.as_ref())?;
    let backend = load::backend(&args.device)?;
    let engine = generate::engine(&model, draft.as_ref(), config, backend.as_ref(), io)?;
    let text_limit = text_limit(&tokenizer, config.context_len);
    let served = Served {
        name: args.served_model_name.clone().unwrap_or_else(|| base_name(name)),
        config,
        stop_tokens: model.stop_tokens().to_vec(),
        tokenizer: Arc::new(tokenizer),
        tool_format: args.tool_format.or_else(|| ToolFormat::of(template.as_ref()?)),
        template,
        time_limit: (args.request_seconds > 0).then(|| Duration::from_secs(args.request_seconds)),
        text_limit,
        long_texts: Mutex::new(()),
        guides: Guides::default(),
    };
    Ok((engine, served))
}

/// The template in `file`, else the model's own.
fn template(file: Option<&Path>, model: &Model) -> anyhow::Result<Option<ChatTemplate>> {
    let Some(file) = file else { return Ok(ChatTemplate::from_files(model.files())?) };
    let unusable = || format!("--chat-template {} cannot be used", file.display());
    let source = std::fs::read_to_string(file).with_context(unusable)?;
    ChatTemplate::from_source(source, model.files()).with_context(unusable).map(Some)
}

/// Bytes that no text of `context` tokens can have: as if all were the longest one, and something
/// for tokenizers that shorten a text before they split it.
fn text_limit(tokenizer: &Tokenizer, context: u32) -> usize {
    let bytes = |id: u32| tokenizer.token(TokenId(id)).map_or(0, |token| token.len());
    let longest = (0..tokenizer.vocab_size() as u32).map(bytes).max().unwrap_or(1);
    longest.saturating_mul(context as usize).saturating_mul(4)
}

/// The last part of a path.
fn base_name(name: &str) -> String {
    let last = Path::new(name).file_name().map(|last| last.to_string_lossy().into_owned());
    last.unwrap_or_else(|| name.to_owned())
}

/// Sizes of the engine: a prompt chunk beside the decodes of a full house, and keys and values for
/// every running request if the memory allows.
fn config(args: &ServeArgs, model: &Model, draft: Option<&Draft>) -> anyhow::Result<EngineConfig> {
    let (spec, max_sequences) = (model.spec(), args.max_running as usize);
    let max_drafted = draft.map_or(0, Draft::max_drafted);
    let wanted = max_sequences.saturating_mul(spec.context_len as usize);
    let mut config = EngineConfig {
        vocab: spec.vocab,
        context_len: spec.context_len,
        step_tokens: load::STEP_TOKENS.max(2 * max_sequences),
        max_sequences,
        blocks: wanted.div_ceil(BLOCK_LEN),
        block_len: BLOCK_LEN,
        max_waiting: args.max_queue as usize,
        max_drafted,
        max_scored: MAX_SCORED,
        prefix_caching: prefix_caching(args, model, draft),
    };
    let fit = || wanted.min(positions_that_fit(args, (model, draft), &config));
    let positions = args.kv_tokens.unwrap_or_else(fit).next_multiple_of(BLOCK_LEN);
    if positions < BLOCK_LEN {
        bail!("--kv-tokens is {positions}: give at least {BLOCK_LEN}");
    }
    config.blocks = positions / BLOCK_LEN;
    Ok(config)
}

/// Whether requests share what they have in common, and up to which length all of it.
fn prefix_caching(args: &ServeArgs, model: &Model, draft: Option<&Draft>) -> PrefixCaching {
    let models = [Some(model), draft.and_then(Draft::model)];
    match models.into_iter().flatten().map(|m| m.spec().steady_len()).min() {
        Some(steady_len) if !args.no_prefix_cache => PrefixCaching::On { steady_len },
        _ => PrefixCaching::Off,
    }
}

/// Positions whose keys and values fit into memory, of those that `config` asks for.
fn positions_that_fit(
    args: &ServeArgs,
    (model, draft): (&Model, Option<&Draft>),
    config: &EngineConfig,
) -> usize {
    let drafting = draft.and_then(Draft::model).map(|m| (m.program(), config.draft_limits()));
    let runners: Vec<_> =
        [(model.program(), config.step_limits())].into_iter().chain(drafting).collect();
    let fits = match args.device.device {
        DeviceName::Cuda(number) => cuda_positions(number, &runners),
        DeviceName::Cpu | DeviceName::Reference => machine::available_memory().map(|free| {
            // Half of it, two bytes an element.
            let elements: usize = runners.iter().map(|(p, _)| p.kv_elements_per_token()).sum();
            usize::try_from(free / 2).unwrap_or(usize::MAX) / (2 * elements.max(1))
        }),
    };
    fits.unwrap_or(usize::MAX)
}

/// The same on a GPU; none where it is missing or cannot run them, which building them says.
fn cuda_positions(number: usize, runners: &[(&Program, StepLimits)]) -> Option<usize> {
    let device = cuda::devices().ok()?.into_iter().nth(number)?;
    cuda::tokens_that_fit(runners, device.free).ok()
}
