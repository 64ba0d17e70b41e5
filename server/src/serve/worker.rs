//! The engine's side of a server: takes requests from a channel, steps, and tells each request's
//! client what came of it.
//!
//! One thread owns the engine; clients hold a [`Handle`] and, for each request, [`Updates`]. A
//! client's channel has room for everything its request can ever say, so that a slow reader never
//! stops a step. A dropped [`Updates`] cancels its request. Not here: HTTP, text.

use super::metrics::{Brought, Ended, Metrics};
use engine::engine::{Engine, EngineConfig, Progress};
use engine::logprobs::TokenLogprob;
use engine::request::{Event, FinishReason, Rejected, Request, RequestId, TokenSource};
use engine::speculation::SpeculationCounts;
use engine::speculation::policy::Source;
use kernels::program::TokenId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Commands that wait for the end of a step.
const COMMANDS: usize = 256;

/// Tokens of a request that come faster than this go out together: a reader sees no difference, and
/// waking a thread for each takes a good part of a small model's step.
const PIECE_GAP: Duration = Duration::from_millis(4);

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Token {
    pub id: TokenId,
    pub source: TokenSource,
    pub logprob: Option<TokenLogprob>,
}

/// What a client hears of its request.
#[derive(Debug)]
pub(crate) enum Update {
    /// How likely some of the prompt's tokens were, in order from the second.
    Prompt(Vec<TokenLogprob>),
    /// What a step generated, or several fast ones.
    Tokens(Vec<Token>),
    /// The last update.
    Ended(Ending),
    /// The last update: it failed, in a sentence.
    Failed(String),
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ending {
    pub reason: FinishReason,
    pub speculation: SpeculationCounts,
    /// Cycles by how many proposed tokens they accepted, from 0 to the most that may be drafted.
    pub accepted_in: Vec<u64>,
    pub times: Times,
    /// Tokens of the prompt that were computed for others before.
    pub cached_tokens: usize,
}

/// Where a request's time went.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Times {
    /// From its arrival to its first token, waiting included.
    pub prompt: Duration,
    /// From its first token to its end.
    pub decode: Duration,
}

/// Why a request is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error(transparent)]
    Rejected(#[from] Rejected),
    #[error("the server is stopping: send the request to another one, or later")]
    Stopping,
}

enum Command {
    Submit { request: Box<Request>, reply: oneshot::Sender<Result<Updates, Rejected>> },
    Stop,
}

/// A client's end of a request.
#[derive(Debug)]
pub(crate) struct Updates {
    receiver: mpsc::Receiver<Update>,
    cancelled: Arc<AtomicBool>,
}

impl Updates {
    /// The next update; none after the last one.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        self.receiver.recv().await
    }

    /// Asks for no more tokens; [`Update::Ended`] still comes.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// The engine as its clients see it.
#[derive(Debug, Clone)]
pub(crate) struct Handle {
    commands: mpsc::Sender<Command>,
}

impl Handle {
    /// Has `request` computed.
    pub(crate) async fn submit(&self, request: Request) -> Result<Updates, Refused> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Submit { request: Box::new(request), reply };
        self.commands.send(command).await.map_err(|_| Refused::Stopping)?;
        Ok(answer.await.map_err(|_| Refused::Stopping)??)
    }

    /// Takes no more requests and ends when the open ones have ended.
    pub(crate) async fn stop(&self) {
        // The worker is gone already where this fails.
        let _ = self.commands.send(Command::Stop).await;
    }
}

/// Requests on their way to a worker.
#[derive(Debug)]
pub(crate) struct Inbox(mpsc::Receiver<Command>);

/// A handle and where its requests arrive.
pub(crate) fn channel() -> (Handle, Inbox) {
    let (commands, inbox) = mpsc::channel(COMMANDS);
    (Handle { commands }, Inbox(inbox))
}

/// Serves what arrives in `inbox` until told to stop, or until all handles are gone; then, for at
/// most `drain`, what is open.
///
/// # Panics
/// At the end, if the bookkeeping of KV blocks is broken: the process then says so by its exit code.
pub(crate) fn run(engine: Engine, inbox: Inbox, metrics: &Metrics, drain: Duration) {
    let (clients, booked) = (BTreeMap::new(), Instant::now());
    let mut worker = Worker { engine, clients, metrics, booked, stop: None };
    let Inbox(mut inbox) = inbox;
    let mut events = vec![];
    loop {
        worker.take(&mut inbox);
        worker.cancel_abandoned();
        if worker.stop.is_some_and(|since| worker.clients.is_empty() || since.elapsed() >= drain) {
            worker.engine.check_integrity();
            return;
        }
        let start = Instant::now();
        // An error has reached every client as an event.
        let progress = worker.engine.step(&mut events).unwrap_or(Progress::Idle);
        // Before the clients hear of it: who has heard of the end of a request finds it counted.
        metrics.step(&progress, start.elapsed(), &worker.engine.counts());
        // The next step may take long where prompts are computed.
        let quick = matches!(progress, Progress::Worked { prefill_tokens: 0, .. });
        worker.note_begun(start);
        worker.dispatch(&mut events, quick);
        worker.book_time();
    }
}

struct Worker<'a> {
    engine: Engine,
    clients: BTreeMap<RequestId, Client>,
    metrics: &'a Metrics,
    /// Until when its time is booked.
    booked: Instant,
    /// Since when no more requests are taken.
    stop: Option<Instant>,
}

impl Worker<'_> {
    /// Takes what has arrived; waits while there is nothing else to do.
    fn take(&mut self, inbox: &mut mpsc::Receiver<Command>) {
        loop {
            let idle = self.engine.counts().open == 0 && self.clients.is_empty();
            let command = match (self.stop, idle) {
                (None, true) => {
                    let command = inbox.blocking_recv();
                    self.booked = Instant::now();
                    command
                }
                _ => match inbox.try_recv() {
                    Ok(command) => Some(command),
                    Err(mpsc::error::TryRecvError::Empty) => return,
                    Err(mpsc::error::TryRecvError::Disconnected) => None,
                },
            };
            match command {
                Some(Command::Submit { request, reply }) if self.stop.is_none() => {
                    self.submit(*request, reply);
                }
                // The reply is dropped, which says that the server stops.
                Some(Command::Submit { .. }) => {}
                Some(Command::Stop) => {
                    self.stop.get_or_insert_with(Instant::now);
                }
                None => {
                    self.stop.get_or_insert_with(Instant::now);
                    return;
                }
            }
        }
    }

    fn submit(&mut self, request: Request, reply: oneshot::Sender<Result<Updates, Rejected>>) {
        // The next step computes its prompt, which may take long.
        self.clients.values_mut().for_each(Client::send_held);
        let room = capacity(&request, self.engine.config());
        let prompt_tokens = request.prompt.len();
        let arrived = Instant::now();
        let answer = self.engine.submit(request).map(|id| {
            let (sender, receiver) = mpsc::channel(room);
            let cancelled = Arc::new(AtomicBool::new(false));
            let updates = Updates { receiver, cancelled: cancelled.clone() };
            let accepted_in = vec![0; self.engine.config().max_drafted + 1];
            let pending = Pending::default();
            let (begun, first, last, tokens) = (None, None, arrived, 0);
            let (held, sent) = (vec![], None);
            let client = Client {
                sender,
                cancelled,
                prompt_tokens,
                tokens,
                arrived,
                begun,
                first,
                last,
                accepted_in,
                held,
                sent,
                pending,
            };
            self.clients.insert(id, client);
            updates
        });
        // A client that left meanwhile shows by its closed channel.
        let _ = reply.send(answer);
    }

    fn cancel_abandoned(&mut self) {
        let left = self.clients.iter().filter(|(_, client)| client.left());
        let left: Vec<RequestId> = left.map(|(id, _)| *id).collect();
        left.into_iter().for_each(|id| self.engine.cancel(id));
    }

    /// Who had no place, and has one now, got it in the step that began at `start`.
    fn note_begun(&mut self, start: Instant) {
        for client in self.clients.values_mut() {
            client.begun.get_or_insert(start);
        }
        for id in self.engine.queued() {
            if let Some(client) = self.clients.get_mut(&id) {
                client.begun = None;
            }
        }
    }

    /// Books what a step brought and tells the clients. After a `quick` step, the next one is taken
    /// to be quick too, so that what is held back now goes out soon.
    fn dispatch(&mut self, events: &mut Vec<Event>, quick: bool) {
        for event in events.drain(..) {
            self.book(event);
        }
        let now = Instant::now();
        for client in self.clients.values_mut() {
            client.flush(now, quick, self.metrics);
        }
        let open = self.clients.len();
        self.clients.retain(|_, client| client.pending.end.is_none());
        if self.clients.len() < open
            && let Some(verdict) = self.engine.verdict(Source::Model)
        {
            self.metrics.verdict(&verdict);
        }
    }

    fn book_time(&mut self) {
        let now = Instant::now();
        self.metrics.worked(now - self.booked);
        self.booked = now;
    }

    fn book(&mut self, event: Event) {
        let id = match &event {
            Event::Prompt { id, .. } | Event::Token { id, .. } => *id,
            Event::Finished { id, .. } | Event::Failed { id, .. } => *id,
        };
        let Some(client) = self.clients.get_mut(&id) else { return };
        let pending = &mut client.pending;
        match event {
            Event::Prompt { logprob, .. } => pending.prompt.push(logprob),
            Event::Token { token, source, logprob, .. } => {
                pending.tokens.push(Token { id: token, source, logprob });
            }
            Event::Finished { reason, speculation, cached_tokens, .. } => {
                pending.end = Some(End::Finished { reason, speculation, cached_tokens });
            }
            Event::Failed { reason, .. } => pending.end = Some(End::Failed(reason)),
        }
    }
}

/// Updates that a request can cause at most: one for each step that computes some of its prompt or
/// generates a token, and the last one.
fn capacity(request: &Request, config: &EngineConfig) -> usize {
    let most = request.prompt.len().saturating_add(request.max_tokens as usize);
    most.min(config.context_len as usize) + 2
}

/// A request's client, and what a step has brought it so far.
struct Client {
    sender: mpsc::Sender<Update>,
    cancelled: Arc<AtomicBool>,
    prompt_tokens: usize,
    /// Tokens generated for it.
    tokens: usize,
    arrived: Instant,
    /// When it got a place.
    begun: Option<Instant>,
    /// When its first token came.
    first: Option<Instant>,
    /// When its last tokens came.
    last: Instant,
    accepted_in: Vec<u64>,
    /// Tokens that soon go out.
    held: Vec<Token>,
    /// When tokens last went out.
    sent: Option<Instant>,
    pending: Pending,
}

#[derive(Default)]
struct Pending {
    prompt: Vec<TokenLogprob>,
    tokens: Vec<Token>,
    end: Option<End>,
}

enum End {
    Finished { reason: FinishReason, speculation: SpeculationCounts, cached_tokens: usize },
    Failed(String),
}

impl Client {
    fn left(&self) -> bool {
        self.sender.is_closed() || self.cancelled.load(Ordering::Relaxed)
    }

    /// Sends what is pending, or holds it back for a moment if the next step is `quick`; who has
    /// left misses nothing, and nobody's channel is too small.
    fn flush(&mut self, now: Instant, quick: bool, metrics: &Metrics) {
        if !self.pending.prompt.is_empty() {
            let _ = self.sender.try_send(Update::Prompt(std::mem::take(&mut self.pending.prompt)));
        }
        if !self.pending.tokens.is_empty() {
            let tokens = std::mem::take(&mut self.pending.tokens);
            self.count(&tokens);
            metrics.tokens(tokens.len(), self.brought(now));
            self.first.get_or_insert(now);
            self.last = now;
            self.tokens += tokens.len();
            self.held.extend(tokens);
        }
        let recent = self.sent.is_some_and(|sent| now - sent < PIECE_GAP);
        if !(quick && recent && self.pending.end.is_none()) {
            self.send_held();
        }
        let Some(end) = &self.pending.end else { return };
        self.tell_end(end, now, metrics);
        let update = match end {
            End::Failed(reason) => Update::Failed(reason.clone()),
            End::Finished { reason, speculation, cached_tokens } => {
                let (accepted_in, times) = (self.accepted_in.clone(), self.times(now));
                let (reason, speculation) = (*reason, *speculation);
                let cached_tokens = *cached_tokens;
                Update::Ended(Ending { reason, speculation, accepted_in, times, cached_tokens })
            }
        };
        let _ = self.sender.try_send(update);
    }

    fn send_held(&mut self) {
        if !self.held.is_empty() {
            self.sent = Some(self.last);
            let _ = self.sender.try_send(Update::Tokens(std::mem::take(&mut self.held)));
        }
    }

    fn brought(&self, now: Instant) -> Brought {
        let (wait, prompt_tokens) = (now - self.last, self.prompt_tokens);
        match self.first {
            None => Brought::First { prompt_tokens, wait },
            Some(_) => Brought::Later { wait },
        }
    }

    fn tell_end(&self, end: &End, now: Instant, metrics: &Metrics) {
        let (reason, speculation) = match end {
            End::Failed(_) => (None, SpeculationCounts::default()),
            // Who asks for an end has found a stop string; who leaves just leaves.
            End::Finished { reason: FinishReason::Cancelled, speculation: counts, .. }
                if self.cancelled.load(Ordering::Relaxed) =>
            {
                (Some(FinishReason::Stop), *counts)
            }
            End::Finished { reason, speculation: counts, .. } => (Some(*reason), *counts),
        };
        let accepted_in = if reason.is_some() { &self.accepted_in[..] } else { &[] };
        let (prompt_tokens, tokens) = (self.prompt_tokens, self.tokens);
        let since = |then: Option<Instant>| then.unwrap_or(now).duration_since(self.arrived);
        let (lasted, waited, first) = (since(None), since(self.begun), since(self.first));
        metrics.ended(&Ended {
            reason,
            prompt_tokens,
            tokens,
            lasted,
            waited,
            first,
            speculation,
            accepted_in,
        });
    }

    /// A step is a cycle if anything was proposed in it.
    fn count(&mut self, tokens: &[Token]) {
        if tokens.iter().all(|token| token.source == TokenSource::Plain) {
            return;
        }
        let accepted = tokens.iter().filter(|t| t.source == TokenSource::Drafted).count();
        if let Some(count) = self.accepted_in.get_mut(accepted) {
            *count += 1;
        }
    }

    fn times(&self, now: Instant) -> Times {
        let first = self.first.unwrap_or(now);
        Times { prompt: first - self.arrived, decode: now - first }
    }
}
