//! All continuations that one request asks for, computed side by side.
//!
//! Input: the engine's requests; output: deltas with the number of the choice they belong to, as
//! they come. Not here: how a choice is written.

use super::super::app::{App, Served};
use super::super::error::ApiError;
use super::super::generation::{Delta, Generation, Wording};
use engine::request::Request;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::Instant;

type Next =
    Pin<Box<dyn Future<Output = (usize, Generation, Result<Option<Delta>, ApiError>)> + Send>>;

/// Continuations that are being computed; dropping them cancels all.
pub(crate) struct Choices {
    next: FuturesUnordered<Next>,
    /// When they are given up, and after how long.
    deadline: Option<(Instant, Duration)>,
}

impl Choices {
    /// Starts all of them; if one is refused, none goes on.
    pub(crate) async fn start(
        app: &App,
        served: &Served,
        requests: Vec<Request>,
        wording: &Wording,
    ) -> Result<Self, ApiError> {
        let deadline = served.time_limit.map(|limit| (Instant::now() + limit, limit));
        let mut started = Vec::with_capacity(requests.len());
        for request in requests {
            let tokenizer = Some(served.tokenizer.clone());
            started
                .push(Generation::start(&app.handle, request, tokenizer, wording.clone()).await?);
        }
        let next = started.into_iter().enumerate().map(|(i, g)| step(i, g)).collect();
        Ok(Self { next, deadline })
    }

    /// The next delta of any choice, with its number; none when all have ended.
    ///
    /// # Errors
    /// What went wrong with one of them, or that the time is over; dropping `self` then cancels all.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Delta)>, ApiError> {
        let Some((deadline, limit)) = self.deadline else { return self.any().await };
        tokio::time::timeout_at(deadline, self.any()).await.unwrap_or_else(|_| {
            let message = format!("the answer was not complete after {} seconds", limit.as_secs());
            Err(ApiError::unavailable(message).code("timeout"))
        })
    }

    async fn any(&mut self) -> Result<Option<(usize, Delta)>, ApiError> {
        while let Some((index, generation, delta)) = self.next.next().await {
            if let Some(delta) = delta? {
                if delta.finish.is_none() {
                    self.next.push(step(index, generation));
                }
                return Ok(Some((index, delta)));
            }
        }
        Ok(None)
    }
}

fn step(index: usize, mut generation: Generation) -> Next {
    Box::pin(async move {
        let delta = generation.next().await;
        (index, generation, delta)
    })
}
