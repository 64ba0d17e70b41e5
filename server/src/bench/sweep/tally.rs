//! What one way of decoding took and did, and what the cost model says of it.
//!
//! Input: requests as they were driven, and the clock around the runners. Not here: rows
//! ([`super::rows`]).

use super::clocked::Lap;
use crate::generate::Ending;
use crate::speed::Timings;
use engine::speculation::Costs;
use std::ops::AddAssign;

/// Sums over requests, of the steps after each prompt.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    /// Seconds of whole steps.
    pub(super) seconds: f64,
    /// Tokens generated in them.
    pub(super) tokens: usize,
    /// Those steps, whether or not anything was drafted.
    pub(super) cycles: usize,
    /// Those with drafted tokens.
    pub(super) drafting_cycles: u64,
    pub(super) drafted: u64,
    pub(super) accepted: u64,
    /// Proposed tokens that were judged and not accepted; those behind them were not judged.
    pub(super) corrected: u64,
    /// Inside the runners.
    pub(super) lap: Lap,
}

impl AddAssign<&Self> for Tally {
    fn add_assign(&mut self, more: &Self) {
        self.seconds += more.seconds;
        self.tokens += more.tokens;
        self.cycles += more.cycles;
        self.drafting_cycles += more.drafting_cycles;
        self.drafted += more.drafted;
        self.accepted += more.accepted;
        self.corrected += more.corrected;
        self.lap += &more.lap;
    }
}

impl Tally {
    /// Of one request; `lap` is what the runners did after its prompt.
    pub(super) fn of(timings: &Timings, ending: &Ending, corrected: u64, lap: Lap) -> Self {
        Self {
            seconds: timings.decode.as_secs_f64(),
            tokens: timings.decode_tokens,
            cycles: timings.decode_steps,
            drafting_cycles: ending.counts.cycles,
            drafted: ending.counts.drafted_tokens,
            accepted: ending.counts.accepted_tokens,
            corrected,
            lap,
        }
    }

    /// Of all requests of all of them.
    pub(super) fn sum<'a>(tallies: impl Iterator<Item = &'a Self>) -> Self {
        tallies.fold(Self::default(), |mut sum, tally| {
            sum += tally;
            sum
        })
    }

    pub(super) fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }

    /// Share of the judged tokens that were accepted; none where none was judged.
    pub(super) fn acceptance(&self) -> Option<f64> {
        let judged = self.accepted + self.corrected;
        (judged > 0).then(|| self.accepted as f64 / judged as f64)
    }

    pub(super) fn tokens_per_cycle(&self) -> f64 {
        self.tokens as f64 / self.cycles.max(1) as f64
    }

    /// Seconds of a cycle in the draft model.
    pub(super) fn draft_seconds(&self) -> f64 {
        self.of_a_cycle(self.lap.draft.time.as_secs_f64())
    }

    /// Seconds of a cycle in the verifier.
    pub(super) fn verify_seconds(&self) -> f64 {
        self.of_a_cycle(self.lap.verifier.time.as_secs_f64())
    }

    /// Seconds of a cycle outside both runners.
    pub(super) fn other_seconds(&self) -> f64 {
        let inside = self.lap.verifier.time + self.lap.draft.time;
        self.of_a_cycle(self.seconds - inside.as_secs_f64())
    }

    fn of_a_cycle(&self, seconds: f64) -> f64 {
        seconds / self.cycles.max(1) as f64
    }

    /// Seconds of a token that the cost model gives these very steps.
    pub(super) fn predicted_seconds_per_token(&self, costs: &Costs) -> f64 {
        let (Lap { verifier, draft, starts }, tokens) = (&self.lap, self.tokens as f64);
        let rows = |(&m, &steps): (&usize, &usize)| costs.verify.seconds(m) * steps as f64;
        let verify: f64 = verifier.by_rows.iter().map(rows).sum();
        let drafts = costs.draft.as_ref().map_or(0.0, |costs| {
            // Rows beyond the one that gives a token catch up.
            let step = |m: usize| costs.step.seconds(1) + costs.prefill_token * (m - 1) as f64;
            let steps = draft.by_rows.iter().map(|(&m, &steps)| step(m.max(1)) * steps as f64);
            steps.sum::<f64>() + costs.start * *starts as f64
        });
        let lookups = self.drafting_cycles.saturating_sub(*starts as u64) as f64 * costs.lookup;
        (verify + drafts + lookups + costs.token * tokens) / tokens.max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::clocked::Steps;
    use super::*;
    use engine::speculation::{Curve, DraftCosts};
    use std::time::Duration;

    fn steps(millis: u64, by_rows: &[(usize, usize)]) -> Steps {
        Steps { time: Duration::from_millis(millis), by_rows: by_rows.iter().copied().collect() }
    }

    fn tally() -> Tally {
        let (verifier, draft) = (steps(56, &[(3, 8)]), steps(32, &[(1, 12), (2, 2)]));
        Tally {
            seconds: 0.100,
            tokens: 20,
            cycles: 8,
            drafting_cycles: 8,
            drafted: 16,
            accepted: 12,
            corrected: 3,
            lap: Lap { verifier, draft, starts: 7 },
        }
    }

    #[test]
    fn a_cycle_is_the_verifier_the_draft_and_the_rest() {
        let one = tally();
        let twice = Tally::sum([&one, &one].into_iter());
        for tally in [one, twice] {
            assert_eq!((tally.tokens_per_cycle(), tally.acceptance()), (2.5, Some(0.8)));
            assert_eq!((tally.verify_seconds(), tally.draft_seconds()), (0.007, 0.004));
            // Twelve milliseconds are left for eight cycles.
            assert!((tally.other_seconds() - 0.0015).abs() < 1e-12);
            assert!((tally.tokens_per_second() - 200.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_prediction_prices_every_step() {
        let step = Curve::new(vec![(1, 0.002)]).unwrap();
        let draft = Some(DraftCosts { step, start: 0.000_5, prefill_token: 0.001 });
        let verify = Curve::new(vec![(1, 0.005), (3, 0.007)]).unwrap();
        let costs = Costs { verify, draft, lookup: 0.000_01, token: 0.000_1 };
        let draft = 14.0 * 0.002 + 2.0 * 0.001 + 7.0 * 0.000_5;
        let expected = 8.0 * 0.007 + draft + 0.000_01 + 20.0 * 0.000_1;
        let one = tally();
        let twice = Tally::sum([&one, &one].into_iter());
        for tally in [one, twice] {
            let found = tally.predicted_seconds_per_token(&costs);
            assert!((found - expected / 20.0).abs() < 1e-12, "{found}");
        }
    }

    #[test]
    fn without_drafts_there_is_nothing_to_divide_by() {
        let plain = Tally { seconds: 1.0, tokens: 4, cycles: 4, ..Tally::default() };
        assert_eq!((plain.acceptance(), plain.draft_seconds()), (None, 0.0));
        assert_eq!((plain.tokens_per_second(), plain.other_seconds()), (4.0, 0.25));
    }
}
