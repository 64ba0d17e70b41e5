//! What a Foretoken server says of its own steps, where it says so.
//!
//! Input: the text of `/metrics` before and after a load. Other servers have no such counters, and
//! nothing is said then.

use super::client::Client;
use axum::http::StatusCode;
use serde::Serialize;

/// Counters of a server.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Books {
    pub steps: f64,
    /// Inside the engine's steps.
    pub step_seconds: f64,
    /// The same and what the engine's thread did between them.
    pub worker_seconds: f64,
}

impl Books {
    /// What the server behind `client` says now.
    pub(super) async fn of(client: &Client) -> Option<Self> {
        let (status, text) = client.get("/metrics").await.ok()?;
        (status == StatusCode::OK).then(|| Self::parse(&text)).flatten()
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            lines.filter(|(found, _)| *found == name).find_map(|(_, value)| value.parse().ok())
        };
        Some(Self {
            steps: value("foretoken_steps_total")?,
            step_seconds: value("foretoken_step_seconds_total")?,
            worker_seconds: value("foretoken_worker_seconds_total")?,
        })
    }

    /// What was added since `before`; none if there was no step.
    pub(super) fn since(self, before: Self) -> Option<Self> {
        let steps = self.steps - before.steps;
        (steps > 0.0).then_some(Self {
            steps,
            step_seconds: self.step_seconds - before.step_seconds,
            worker_seconds: self.worker_seconds - before.worker_seconds,
        })
    }

    /// Milliseconds of a step.
    pub(super) fn step_ms(self) -> f64 {
        self.step_seconds / self.steps * 1e3
    }

    /// Time between steps as a share of the time in them.
    pub(super) fn between(self) -> f64 {
        self.worker_seconds / self.step_seconds - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_load_added() {
        let text = |steps, inside, all| {
            format!(
                "# HELP foretoken_steps_total 9\nforetoken_steps_total {steps}\n\
                 foretoken_step_seconds_total {inside}\nforetoken_worker_seconds_total {all}\n"
            )
        };
        let [before, after] =
            [text(10, 1.0, 1.5), text(30, 5.0, 5.9)].map(|t| Books::parse(&t).unwrap());
        let added = after.since(before).unwrap();
        assert_eq!((added.steps, added.step_ms()), (20.0, 200.0));
        assert!((added.between() - 0.1).abs() < 1e-9);
        assert_eq!(before.since(before), None);
        assert_eq!(Books::parse("vllm:num_requests_running 3\n"), None);
    }
}
