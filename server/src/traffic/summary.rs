//! What a load's answers say: latencies, throughput, goodput, and why requests failed.
//!
//! Input: the outcome of every request that was sent. Output: a table, or JSON. TTFT is the time to
//! the first piece of text. ITL is a request's time per token after its first piece: pieces may hold
//! several tokens, so it is not the time between pieces, which is told beside it.

use super::books::Books;
use super::client::{Answer, Failure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

/// A request that was sent.
#[derive(Debug)]
pub(super) struct Outcome {
    pub prompt_tokens: u32,
    pub result: Result<Answer, Failure>,
}

/// What an answer should not exceed, in milliseconds; none is always met.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Objectives {
    pub ttft_ms: Option<f64>,
    pub itl_ms: Option<f64>,
}

/// The figures of a load.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    pub seconds: f64,
    pub answered: usize,
    /// Failed requests by their status, or `broken`.
    pub failed: BTreeMap<String, Failed>,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    /// False if the server tells no numbers of tokens: then pieces are counted.
    pub tokens_are_exact: bool,
    pub ttft_ms: Quantiles,
    pub itl_ms: Quantiles,
    pub between_pieces_ms: Quantiles,
    pub whole_ms: Quantiles,
    pub goodput: Option<Goodput>,
    pub server: Option<Books>,
}

/// Requests that failed alike.
#[derive(Debug, Default, Serialize)]
pub(super) struct Failed {
    pub count: usize,
    /// What was said of the first one.
    pub reason: String,
}

/// Answers that met all objectives.
#[derive(Debug, Serialize)]
pub(super) struct Goodput {
    pub objectives: Objectives,
    /// Of all requests that were sent, failed ones included.
    pub share: f64,
    pub requests_per_second: f64,
}

/// Nearest ranks of some values, in milliseconds; null of none.
#[derive(Debug, Serialize)]
pub(super) struct Quantiles {
    pub mean: Option<f64>,
    pub p50: Option<f64>,
    pub p90: Option<f64>,
    pub p99: Option<f64>,
    pub max: Option<f64>,
}

impl Quantiles {
    fn of(mut ms: Vec<f64>) -> Self {
        ms.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            let rank = (share * ms.len() as f64).ceil() as usize;
            ms.get(rank.saturating_sub(1)).copied()
        };
        let mean = (!ms.is_empty()).then(|| ms.iter().sum::<f64>() / ms.len() as f64);
        Self { mean, p50: rank(0.5), p90: rank(0.9), p99: rank(0.99), max: rank(1.0) }
    }
}

/// What is said of one answer.
struct Figures {
    ttft: f64,
    /// None of a single token.
    itl: Option<f64>,
    tokens: u64,
}

impl Figures {
    fn of(answer: &Answer) -> Self {
        let (first, last) = (answer.pieces[0], answer.pieces[answer.pieces.len() - 1]);
        let tokens = answer.tokens.unwrap_or(answer.pieces.len() as u64);
        let itl = (tokens > 1).then(|| ms(last - first) / (tokens - 1) as f64);
        Self { ttft: ms(first), itl, tokens }
    }

    fn meets(&self, wanted: Objectives) -> bool {
        let within = |found: f64, most: Option<f64>| most.is_none_or(|most| found <= most);
        within(self.ttft, wanted.ttft_ms) && within(self.itl.unwrap_or(0.0), wanted.itl_ms)
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Summary {
    /// Of all `outcomes`, which took `time` together.
    pub(super) fn new(outcomes: &[Outcome], time: Duration, wanted: Objectives) -> Self {
        let seconds = time.as_secs_f64();
        let answers: Vec<(u32, &Answer)> = outcomes
            .iter()
            .filter_map(|o| Some((o.prompt_tokens, o.result.as_ref().ok()?)))
            .collect();
        let figures: Vec<Figures> = answers.iter().map(|(_, answer)| Figures::of(answer)).collect();
        let gaps = |(_, answer): &(u32, &Answer)| {
            answer.pieces.windows(2).map(|pair| ms(pair[1] - pair[0])).collect::<Vec<_>>()
        };
        let good = figures.iter().filter(|f| f.meets(wanted)).count() as f64;
        let asked = wanted.ttft_ms.is_some() || wanted.itl_ms.is_some();
        Self {
            seconds,
            answered: answers.len(),
            failed: failed(outcomes),
            prompt_tokens: answers.iter().map(|(tokens, _)| u64::from(*tokens)).sum(),
            generated_tokens: figures.iter().map(|f| f.tokens).sum(),
            tokens_are_exact: answers.iter().all(|(_, answer)| answer.tokens.is_some()),
            ttft_ms: Quantiles::of(figures.iter().map(|f| f.ttft).collect()),
            itl_ms: Quantiles::of(figures.iter().filter_map(|f| f.itl).collect()),
            between_pieces_ms: Quantiles::of(answers.iter().flat_map(gaps).collect()),
            whole_ms: Quantiles::of(answers.iter().map(|(_, answer)| ms(answer.whole)).collect()),
            goodput: asked.then(|| Goodput {
                objectives: wanted,
                share: good / outcomes.len().max(1) as f64,
                requests_per_second: good / seconds,
            }),
            server: None,
        }
    }

    /// Writes the table that people read.
    pub(super) fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let rate = |count: u64| count as f64 / self.seconds;
        let (answered, seconds) = (self.answered, self.seconds);
        writeln!(
            out,
            "{answered} answers in {seconds:.2} s, {:.2} a second",
            rate(answered as u64)
        )?;
        for (status, Failed { count, reason }) in &self.failed {
            writeln!(out, "{count} failed, {status}; the first: {reason}")?;
        }
        let (prompt, generated) = (self.prompt_tokens, self.generated_tokens);
        writeln!(out, "tokens of prompts    {prompt}, {:.1} a second", rate(prompt))?;
        let word = if self.tokens_are_exact { "" } else { " (pieces: the server tells no tokens)" };
        writeln!(out, "tokens generated     {generated}, {:.1} a second{word}", rate(generated))?;
        writeln!(
            out,
            "{:20} {:>10} {:>10} {:>10} {:>10}",
            "milliseconds", "p50", "p90", "p99", "max"
        )?;
        for (name, quantiles) in [
            ("first token (TTFT)", &self.ttft_ms),
            ("per token (ITL)", &self.itl_ms),
            ("between pieces", &self.between_pieces_ms),
            ("whole answer", &self.whole_ms),
        ] {
            let Quantiles { p50, p90, p99, max, .. } = quantiles;
            let [p50, p90, p99, max] = [p50, p90, p99, max].map(|value| shown(*value));
            writeln!(out, "{name:20} {p50:>10} {p90:>10} {p99:>10} {max:>10}")?;
        }
        if let Some(goodput) = &self.goodput {
            goodput.write(out)?;
        }
        let Some(server) = self.server else { return Ok(()) };
        let (steps, step, between) = (server.steps, server.step_ms(), server.between() * 1e2);
        writeln!(
            out,
            "server               {steps} steps of {step:.3} ms; {between:.1} % more between them"
        )
    }
}

impl Goodput {
    fn write(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let most = |name: &str, ms: Option<f64>| ms.map(|ms| format!("{name} at most {ms} ms"));
        let Objectives { ttft_ms, itl_ms } = self.objectives;
        let all: Vec<String> =
            [most("TTFT", ttft_ms), most("ITL", itl_ms)].into_iter().flatten().collect();
        let (share, rate) = (self.share * 1e2, self.requests_per_second);
        writeln!(
            out,
            "goodput              {share:.1} % of requests, {rate:.2} a second: {}",
            all.join(", ")
        )
    }
}

fn shown(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.2}"))
}

fn failed(outcomes: &[Outcome]) -> BTreeMap<String, Failed> {
    let mut all = BTreeMap::<String, Failed>::new();
    for failure in outcomes.iter().filter_map(|outcome| outcome.result.as_ref().err()) {
        let name = failure.status.map_or_else(|| "broken".to_owned(), |s| format!("status {s}"));
        let of = all.entry(name).or_default();
        if of.count == 0 {
            of.reason.clone_from(&failure.reason);
        }
        of.count += 1;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(pieces: &[u64], tokens: Option<u64>) -> Outcome {
        let pieces: Vec<Duration> = pieces.iter().copied().map(Duration::from_millis).collect();
        let whole = pieces[pieces.len() - 1] + Duration::from_millis(1);
        Outcome { prompt_tokens: 5, result: Ok(Answer { pieces, whole, tokens }) }
    }

    fn failure(status: Option<u16>, reason: &str) -> Outcome {
        let reason = reason.to_owned();
        Outcome { prompt_tokens: 5, result: Err(Failure { status, reason }) }
    }

    #[test]
    fn figures_of_known_answers() {
        let outcomes = [
            answer(&[10, 20, 40], Some(4)),
            answer(&[30], Some(1)),
            answer(&[20, 80], Some(3)),
            failure(Some(429), "full"),
            failure(None, "gone"),
            failure(Some(429), "full again"),
        ];
        let wanted = Objectives { ttft_ms: Some(20.0), itl_ms: Some(10.0) };
        let summary = Summary::new(&outcomes, Duration::from_secs(2), wanted);
        assert_eq!((summary.answered, summary.prompt_tokens, summary.generated_tokens), (3, 15, 8));
        let Quantiles { mean, p50, p99, max, .. } = summary.ttft_ms;
        assert_eq!((mean, p50, p99, max), (Some(20.0), Some(20.0), Some(30.0), Some(30.0)));
        // 30 ms for three tokens, 60 ms for two.
        assert_eq!((summary.itl_ms.p50, summary.itl_ms.max), (Some(10.0), Some(30.0)));
        assert_eq!((summary.between_pieces_ms.p50, summary.whole_ms.max), (Some(20.0), Some(81.0)));
        let goodput = summary.goodput.unwrap();
        assert_eq!((goodput.share, goodput.requests_per_second), (1.0 / 6.0, 0.5));
        let full = &summary.failed["status 429"];
        assert_eq!((full.count, full.reason.as_str()), (2, "full"));
        assert_eq!(summary.failed["broken"].count, 1);
        assert!(summary.tokens_are_exact);
    }

    #[test]
    fn pieces_stand_in_where_tokens_are_unknown_and_nothing_is_made_up_of_nothing() {
        let none = Objectives { ttft_ms: None, itl_ms: None };
        let summary = Summary::new(&[answer(&[1, 2], None)], Duration::from_secs(1), none);
        assert_eq!((summary.generated_tokens, summary.tokens_are_exact), (2, false));
        assert!(summary.goodput.is_none());
        let empty = Summary::new(&[], Duration::from_secs(1), none);
        let mut text = vec![];
        empty.write(&mut text).unwrap();
        assert!(String::from_utf8(text).unwrap().contains(" -"));
        assert_eq!(empty.ttft_ms.p50, None);
    }
}
