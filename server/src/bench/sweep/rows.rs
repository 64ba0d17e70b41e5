//! The rows of `bench --draft`: how they follow from the rounds, their columns, and what people see.
//!
//! Input: a tally for each way (plain decoding, then every length) of each round that counts. Not
//! here: how rows are written ([`crate::bench::output`]).

use super::tally::Tally;
use crate::bench::output::{Row, Table};
use crate::bench::rows::{SETTING, Setting, device, figure, left, others, right, spread, text};
use crate::bench::stats::{Kept, Spread};
use crate::cli::{DraftTokens, SweepArgs};
use engine::speculation::Costs;
use serde::Serialize;
use serde_json::Value;

/// A draft length, or plain decoding. Rates, ratios and seconds are medians over the rounds,
/// counts their sums.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figures {
    #[serde(flatten)]
    setting: Setting,
    draft: String,
    /// `tg128`, `tg128 draft 4`, `tg128 draft auto, 0.80 simulated`.
    test: String,
    /// A number, auto, or off.
    draft_tokens: String,
    /// The acceptance is made up, and the text means nothing.
    simulated: bool,
    simulated_acceptance: Option<f64>,
    temperature: f64,
    /// Generated after each prompt; the prompt's own steps give the first of them, untimed.
    tokens: usize,
    prompts: usize,
    /// Rounds that count.
    repetitions: usize,
    /// Rounds that do not, since other processes were too loud.
    dropped: usize,
    /// All were too loud; the figures are those of the quietest.
    loud: bool,
    /// Processor time of the whole machine that others used, 0 to 1; none where unknown.
    foreign_cpu: Option<f64>,
    tokens_per_second: f64,
    tokens_per_second_min: f64,
    tokens_per_second_max: f64,
    tokens_per_second_stddev: f64,
    /// Plain time over this time, within a round.
    speedup: f64,
    speedup_min: f64,
    speedup_max: f64,
    speedup_stddev: f64,
    /// By the costs measured before the rounds, for the steps that ran.
    predicted_speedup: f64,
    /// Of the drafted tokens that were judged; none where none was.
    acceptance: Option<f64>,
    drafted_tokens: u64,
    accepted_tokens: u64,
    /// Steps after the prompts.
    cycles: usize,
    tokens_per_cycle: f64,
    /// Of a cycle, in the draft model.
    draft_seconds: f64,
    /// Of a cycle, in the verifier.
    verify_seconds: f64,
    /// Of a cycle, outside both: choosing tokens, looking up, bookkeeping.
    other_seconds: f64,
    samples_speedup: Vec<f64>,
}

/// Rows of [`Figures`].
pub(super) static SWEEP: Table = Table {
    name: "foretoken_bench_draft",
    columns: &[
        SETTING,
        &[
            ("draft", "TEXT"),
            ("test", "TEXT"),
            ("draft_tokens", "TEXT"),
            ("simulated", "INTEGER"),
            ("simulated_acceptance", "REAL"),
            ("temperature", "REAL"),
            ("tokens", "INTEGER"),
            ("prompts", "INTEGER"),
            ("repetitions", "INTEGER"),
            ("dropped", "INTEGER"),
            ("loud", "INTEGER"),
            ("foreign_cpu", "REAL"),
            ("tokens_per_second", "REAL"),
            ("tokens_per_second_min", "REAL"),
            ("tokens_per_second_max", "REAL"),
            ("tokens_per_second_stddev", "REAL"),
            ("speedup", "REAL"),
            ("speedup_min", "REAL"),
            ("speedup_max", "REAL"),
            ("speedup_stddev", "REAL"),
            ("predicted_speedup", "REAL"),
            ("acceptance", "REAL"),
            ("drafted_tokens", "INTEGER"),
            ("accepted_tokens", "INTEGER"),
            ("cycles", "INTEGER"),
            ("tokens_per_cycle", "REAL"),
            ("draft_seconds", "REAL"),
            ("verify_seconds", "REAL"),
            ("other_seconds", "REAL"),
            ("samples_speedup", "TEXT"),
        ],
    ],
    cells: &[
        left("model", 14, |row| text(row, "model")),
        left("draft", 12, |row| text(row, "draft")),
        left("device", 10, device),
        right("threads", 7, |row| text(row, "threads")),
        right("temp", 4, |row| text(row, "temperature")),
        right("tokens", 6, |row| text(row, "tokens")),
        right("drafted", 7, |row| text(row, "draft_tokens")),
        right("tok/s", 26, |row| spread(row, "tokens_per_second", 1)),
        right("speed-up", 24, |row| spread(row, "speedup", 2)),
        right("predicted", 9, |row| figure(row, "predicted_speedup", 1.0, 2, "")),
        left("acceptance", 21, acceptance),
        right("per cycle", 9, |row| figure(row, "tokens_per_cycle", 1.0, 2, "")),
        right("draft us", 9, |row| figure(row, "draft_seconds", 1e6, 1, "")),
        right("verify us", 9, |row| figure(row, "verify_seconds", 1e6, 1, "")),
        right("other us", 8, |row| figure(row, "other_seconds", 1e6, 1, "")),
        left("others", 16, others),
    ],
    legend: "drafted: tokens in a cycle, off is plain decoding. tok/s: after the first token; it and \
             speed-up over plain decoding: median ± standard deviation (least-most) over rounds, in \
             which all took turns. predicted: speed-up by the cost model, for the steps that ran. \
             acceptance: of the drafted tokens that were judged; simulated: each was accepted with \
             that probability, whatever it was, and the text means nothing. A cycle is a step, \
             whether or not anything was drafted; per cycle: tokens; us: microseconds of a cycle in \
             the draft model, in the verifier, and in everything else. others: processor time other \
             processes used, and rounds dropped for it; LOUD: none was quiet.",
};

fn acceptance(row: &Row) -> String {
    let observed = figure(row, "acceptance", 1.0, 2, "");
    match row.get("simulated_acceptance").and_then(Value::as_f64) {
        Some(share) => format!("{observed} ({})", simulated(share)),
        None => observed,
    }
}

fn simulated(share: f64) -> String {
    format!("{share:.2} simulated")
}

/// What the rows of all ways have in common.
#[derive(Debug)]
pub(super) struct Shared<'a> {
    pub(super) setting: Setting,
    pub(super) draft: String,
    pub(super) tokens: usize,
    pub(super) prompts: usize,
    pub(super) args: &'a SweepArgs,
    pub(super) costs: &'a Costs,
}

impl Shared<'_> {
    /// The row of number `way` of every round's tallies: 0 is plain decoding, `i` the length `i - 1`
    /// of the arguments.
    pub(super) fn row(&self, way: usize, kept: &Kept<Vec<Tally>>) -> Figures {
        let of = |value: fn(&Tally) -> f64| -> Vec<f64> {
            kept.values.iter().map(|round| value(&round[way])).collect()
        };
        let median = |value| Spread::of(&of(value)).median;
        let rate = Spread::of(&of(Tally::tokens_per_second));
        let ratio = |round: &Vec<Tally>| round[0].seconds / round[way].seconds.max(1e-9);
        let samples: Vec<f64> = kept.values.iter().map(ratio).collect();
        let speedup = Spread::of(&samples);
        let [plain, tally] = [0, way].map(|i| Tally::sum(kept.values.iter().map(|r| &r[i])));
        let predicted = |tally: &Tally| tally.predicted_seconds_per_token(self.costs);
        // Plain decoding accepts nothing, so nothing of it is simulated.
        let simulation = self.args.acceptance.filter(|_| way > 0);
        Figures {
            setting: self.setting.clone(),
            draft: self.draft.clone(),
            test: self.name(way, simulation),
            draft_tokens: self.length(way),
            simulated: simulation.is_some(),
            simulated_acceptance: simulation,
            temperature: self.args.temperature,
            tokens: self.tokens,
            prompts: self.prompts,
            repetitions: kept.values.len(),
            dropped: kept.dropped,
            loud: kept.loud,
            foreign_cpu: kept.foreign,
            tokens_per_second: rate.median,
            tokens_per_second_min: rate.min,
            tokens_per_second_max: rate.max,
            tokens_per_second_stddev: rate.deviation,
            speedup: speedup.median,
            speedup_min: speedup.min,
            speedup_max: speedup.max,
            speedup_stddev: speedup.deviation,
            predicted_speedup: predicted(&plain) / predicted(&tally),
            acceptance: tally.acceptance(),
            drafted_tokens: tally.drafted,
            accepted_tokens: tally.accepted,
            cycles: tally.cycles,
            tokens_per_cycle: tally.tokens_per_cycle(),
            draft_seconds: median(Tally::draft_seconds),
            verify_seconds: median(Tally::verify_seconds),
            other_seconds: median(Tally::other_seconds),
            samples_speedup: samples,
        }
    }

    fn length(&self, way: usize) -> String {
        match way.checked_sub(1).map(|i| self.args.draft_tokens[i]) {
            None | Some(DraftTokens::Off) => "off".to_owned(),
            Some(DraftTokens::Auto) => "auto".to_owned(),
            Some(DraftTokens::Fixed(tokens)) => tokens.to_string(),
        }
    }

    fn name(&self, way: usize, simulation: Option<f64>) -> String {
        let mark = simulation.map(|share| format!(", {}", simulated(share)));
        match way {
            0 => format!("tg{}", self.tokens),
            _ => {
                format!("tg{} draft {}{}", self.tokens, self.length(way), mark.unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
#[path = "rows_tests.rs"]
mod tests;
