//! Whether drafting pays, said in numbers that a person can check.
//!
//! Input: measured costs and the acceptance measured so far. The model is that of Leviathan et al.
//! (arXiv 2211.17192) with measured times: every proposed token is accepted with the same
//! probability. Not here: the lengths of cycles, which look at each place ([`super`]).

use super::acceptance::Source;
use super::costs::Costs;

/// What drafting is worth for one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// The acceptance from which on some length is faster than none; none if no acceptance is.
    pub break_even: Option<f64>,
    /// The acceptance so far; none before anything was drafted.
    pub measured: Option<f64>,
    /// Speed-up over plain decoding with the best length at the measured acceptance, 1 where the
    /// best is not to draft; none before anything was drafted.
    pub expected_speedup: Option<f64>,
    /// That length.
    pub best_length: Option<usize>,
}

impl Verdict {
    /// The verdict on drafts of `source` of at most `longest` tokens, of which the share
    /// `measured` was accepted among those that were judged.
    pub fn new(costs: &Costs, source: Source, longest: usize, measured: Option<f64>) -> Self {
        let best = |acceptance| best(costs, source, longest, acceptance);
        let at_measured = measured.map(best);
        Self {
            break_even: break_even(|acceptance| best(acceptance).0 > 0),
            measured,
            expected_speedup: at_measured.map(|b| b.1),
            best_length: at_measured.map(|b| b.0),
        }
    }
}

impl std::fmt::Display for Verdict {
    /// `break-even acceptance 0.41, measured 0.63, expected 1.60x`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.break_even {
            Some(acceptance) => write!(f, "break-even acceptance {acceptance:.2}")?,
            None => write!(f, "drafts cost more than they can save")?,
        }
        if let Some(measured) = self.measured {
            write!(f, ", measured {measured:.2}")?;
        }
        match self.expected_speedup {
            Some(speedup) => write!(f, ", expected {speedup:.2}x"),
            None => Ok(()),
        }
    }
}

/// The best length for one sequence at an acceptance, and its speed-up; length 0 has 1.
fn best(costs: &Costs, source: Source, longest: usize, acceptance: f64) -> (usize, f64) {
    let plain = costs.verify.seconds(1) + costs.token;
    let (mut chance, mut tokens, mut best) = (1.0, 1.0, (0, 1.0));
    for length in 1..=longest {
        chance *= acceptance;
        tokens += chance;
        let draft = match source {
            Source::Model => {
                let draft = costs.draft.as_ref();
                draft.map_or(0.0, |d| d.start + d.step.seconds(1) * length as f64)
            }
            Source::Lookup { .. } => costs.lookup,
        };
        let time = costs.verify.seconds(1 + length) + draft + costs.token * tokens;
        let speedup = tokens * plain / time;
        if speedup > best.1 {
            best = (length, speedup);
        }
    }
    best
}

/// The least acceptance that pays, to a thousandth; a greater one always pays too.
fn break_even(pays: impl Fn(f64) -> bool) -> Option<f64> {
    let (mut low, mut high) = (0.0, 1.0);
    if !pays(high) {
        return None;
    }
    while high - low > 1e-3 {
        let middle = (low + high) / 2.0;
        if pays(middle) { high = middle } else { low = middle }
    }
    Some(high)
}

#[cfg(test)]
mod tests {
    use super::super::{Curve, DraftCosts};
    use super::*;

    /// T(1) = 1, T(2) = 1.12, and steeply on, a draft step of 0.2.
    fn costs() -> Costs {
        let draft = DraftCosts {
            step: Curve::new(vec![(1, 0.2)]).unwrap(),
            start: 0.0,
            prefill_token: 0.02,
        };
        let verify = Curve::new(vec![(1, 1.0), (2, 1.12), (3, 3.0), (4, 9.0)]).unwrap();
        Costs { verify, draft: Some(draft), lookup: 0.0, token: 0.0 }
    }

    #[test]
    fn break_even_is_where_a_draft_costs_what_it_saves() {
        let verdict = Verdict::new(&costs(), Source::Model, 3, Some(0.66));
        // One token pays from c + v(2) - 1 on.
        assert!((verdict.break_even.unwrap() - 0.32).abs() < 2e-3, "{verdict:?}");
        assert_eq!(verdict.best_length, Some(1));
        assert!((verdict.expected_speedup.unwrap() - 1.66 / 1.32).abs() < 1e-9);
        assert_eq!(
            verdict.to_string(),
            "break-even acceptance 0.32, measured 0.66, expected 1.26x"
        );
        let low = Verdict::new(&costs(), Source::Model, 3, Some(0.2));
        assert_eq!((low.best_length, low.expected_speedup), (Some(0), Some(1.0)));
        let lookup = Verdict::new(&costs(), Source::Lookup { matched: 4 }, 3, None);
        assert!((lookup.break_even.unwrap() - 0.12).abs() < 2e-3);
        assert_eq!(lookup.to_string(), "break-even acceptance 0.12");
    }

    #[test]
    fn a_draft_that_is_too_slow_never_pays() {
        let mut slow = costs();
        slow.draft.as_mut().unwrap().step = Curve::new(vec![(1, 3.0)]).unwrap();
        let verdict = Verdict::new(&slow, Source::Model, 3, Some(0.9));
        assert_eq!((verdict.break_even, verdict.best_length), (None, Some(0)));
        let text = "drafts cost more than they can save, measured 0.90, expected 1.00x";
        assert_eq!(verdict.to_string(), text);
    }
}
