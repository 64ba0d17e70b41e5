//! What every handler can reach: the model as clients see it, and the engine's handle.
//!
//! The address is open before the model is loaded; until then [`App::ready`] refuses.

use super::error::ApiError;
use super::guides::Guides;
use super::metrics::Metrics;
use super::worker;
use crate::cli::ToolFormat;
use axum::http::StatusCode;
use engine::chat::ChatTemplate;
use engine::engine::EngineConfig;
use engine::tokenizer::Tokenizer;
use kernels::program::TokenId;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::runtime::{Handle, RuntimeFlavor};

/// Bytes from which on a text takes milliseconds to become tokens.
const LONG_TEXT: usize = 16 << 10;

/// The model that is served.
#[derive(Debug)]
pub(crate) struct Served {
    /// What clients call it.
    pub name: String,
    pub config: EngineConfig,
    pub stop_tokens: Vec<TokenId>,
    pub tokenizer: Arc<Tokenizer>,
    /// None if the model comes without one.
    pub template: Option<ChatTemplate>,
    /// Longest time from a request to its last token; none has no limit.
    pub time_limit: Option<Duration>,
    /// How the model calls tools, if that is known.
    pub tool_format: Option<ToolFormat>,
    /// Bytes that no text within the context can have.
    pub text_limit: usize,
    /// Held while a long text becomes tokens: that takes time and memory, so they go one by one.
    pub long_texts: Mutex<()>,
    /// For answers that must look like something.
    pub guides: Guides,
}

/// Shared by all handlers.
#[derive(Debug)]
pub(crate) struct App {
    pub handle: worker::Handle,
    pub metrics: Arc<Metrics>,
    /// Seconds since 1970 when the server began.
    pub created: u64,
    served: OnceLock<Arc<Served>>,
    stopping: AtomicBool,
    ids: AtomicU64,
}

impl App {
    /// An app whose model is still loading.
    pub(crate) fn new(handle: worker::Handle, metrics: Arc<Metrics>) -> Self {
        let (served, stopping) = (OnceLock::new(), AtomicBool::new(false));
        let ids = AtomicU64::new(nanoseconds());
        Self { handle, metrics, created: seconds(), served, stopping, ids }
    }

    /// Says that the model is loaded.
    pub(crate) fn serve(&self, served: Served) {
        self.metrics.serve(&served.name, &served.config);
        // There is one loader, so nothing was set before.
        let _ = self.served.set(Arc::new(served));
    }

    /// Says that no more requests are taken.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// The model, or why there is none.
    pub(crate) fn ready(&self) -> Result<Arc<Served>, ApiError> {
        if self.stopping.load(Ordering::Relaxed) {
            return Err(ApiError::unavailable("the server is stopping").code("stopping"));
        }
        let served = self.served.get().cloned();
        served.ok_or_else(|| ApiError::unavailable("the model is loading").code("loading"))
    }

    /// A name for an answer that no other answer has.
    pub(crate) fn answer_id(&self, prefix: &str) -> String {
        format!("{prefix}-{:016x}", self.ids.fetch_add(1, Ordering::Relaxed))
    }

    /// A name for a tool call: nine letters and digits, which is what some templates insist on.
    pub(crate) fn call_id(&self) -> String {
        let mut number = self.ids.fetch_add(1, Ordering::Relaxed);
        let mut digit = || {
            let digit = char::from_digit((number % 36) as u32, 36);
            number /= 36;
            digit
        };
        (0..9).filter_map(|_| digit()).collect()
    }

    /// A seed for a request without one.
    pub(crate) fn seed(&self) -> u64 {
        // Neighbouring numbers become unlike seeds.
        self.ids.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// Runs what may take long beside the threads that speak HTTP.
pub(crate) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let failed = |_| ApiError::failed("the request could not be worked on");
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}

/// Seconds since 1970.
pub(crate) fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn nanoseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

impl Served {
    /// Refuses a request for another model.
    pub(crate) fn check_name(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if name != self.name => {
                let message = format!("there is no model {name:?}, only {:?}", self.name);
                let error = ApiError::invalid(message).of("model").code("model_not_found");
                Err(ApiError { status: StatusCode::NOT_FOUND, ..error })
            }
            _ => Ok(()),
        }
    }

    /// Tokens of `text`. A long one keeps no other request waiting.
    pub(crate) fn encode(&self, text: &str, special: bool) -> Result<Vec<TokenId>, ApiError> {
        if text.len() > self.text_limit {
            let (bytes, context) = (text.len(), self.config.context_len);
            let message = format!(
                "the text has {bytes} bytes, more than the context of {context} tokens can hold: shorten it"
            );
            return Err(ApiError::invalid(message).of("prompt").code("context_length_exceeded"));
        }
        let long = || {
            let _turn = self.long_texts.lock().unwrap_or_else(PoisonError::into_inner);
            self.tokenizer.encode(text, special)
        };
        let tokens = match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
            _ if text.len() < LONG_TEXT => self.tokenizer.encode(text, special),
            Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(long),
            _ => long(),
        };
        tokens.map_err(|_| {
            ApiError::invalid("the text has characters the vocabulary cannot represent")
        })
    }

    /// The text of a single token; half a character is U+FFFD.
    pub(crate) fn token_text(&self, token: TokenId) -> Result<String, ApiError> {
        let text = self.tokenizer.decode(&[token], false);
        text.map_err(|_| ApiError::failed(format!("token {} has no text", token.0)))
    }
}
