//! How often proposed tokens are accepted, by who proposed them and by their place in the cycle.
//!
//! Input: outcomes of cycles. A sequence has its own counts, which lean on the engine's while they
//! are few. Not here: costs and lengths ([`super`]).

/// Places in a cycle that are told apart, and the longest length that is ever chosen.
pub const POSITIONS: usize = 16;

/// Classes of lookup matches: 1, 2 to 3, 4 to 7, 8 to 15, and 16 or more matched tokens.
const MATCH_CLASSES: usize = 5;
/// Sources that are told apart.
pub(super) const SOURCES: usize = 1 + MATCH_CLASSES;

// The values were found by simulation (`policy/tests.rs`): more memory and weight gives drafting up
// too late where a text turns, less gives it up too early where a drafter is unlucky.

/// Acceptance that nobody has seen yet. Of a draft model: high enough that most are tried. Of what
/// was looked up: about m / (m + 3) after a match of m, as counted over Rust sources.
const UNKNOWN: [f64; SOURCES] = [0.8, 0.25, 0.45, 0.62, 0.78, 0.9];
/// Observations that the guess for a place (the engine's: the place before) counts as.
const ENGINE_WEIGHT: f64 = 4.0;
/// Observations that the engine's acceptance counts as in a sequence's own.
const SEQUENCE_WEIGHT: f64 = 12.0;
/// What a cycle leaves of a sequence's earlier counts: about 25 cycles are remembered.
const SEQUENCE_MEMORY: f64 = 0.96;
/// The same for the engine's counts: about a hundred cycles.
const ENGINE_MEMORY: f64 = 0.99;
/// What a new sequence leaves of the engine's counts: after some twenty sequences a drafter that did
/// badly gets another try.
const FADE: f64 = 0.85;

/// Accepted first tokens, as they fade, that prove a source: one of them does for some 230 cycles, or for
/// fourteen sequences.
const PROOF: f64 = 0.1;

/// Who proposes, as far as acceptance tells it apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Source {
    /// The draft model.
    #[default]
    Model,
    /// The text itself, after a match of so many tokens, at least 1.
    Lookup {
        /// Tokens that matched.
        matched: usize,
    },
}

impl Source {
    /// Its number among [`SOURCES`].
    pub(super) fn index(self) -> usize {
        match self {
            Self::Model => 0,
            Self::Lookup { matched } => {
                1 + (matched.max(1).ilog2() as usize).min(MATCH_CLASSES - 1)
            }
        }
    }
}

/// Decayed counts of one place.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    tried: f64,
    accepted: f64,
}

impl Counts {
    /// The share accepted, where `guess` counts as `weight` observations.
    fn share(self, guess: f64, weight: f64) -> f64 {
        (self.accepted + weight * guess) / (self.tried + weight)
    }
}

/// Counts of all sources and places.
#[derive(Debug, Clone, Default)]
pub struct Acceptance {
    counts: [[Counts; POSITIONS]; SOURCES],
}

impl Acceptance {
    /// Books a cycle of `source` in a sequence's own counts and in the engine's: of the proposed
    /// tokens the first `tried` were judged, and the first `accepted` of these were accepted.
    pub(super) fn book(
        &mut self,
        engine: &mut Self,
        source: Source,
        tried: usize,
        accepted: usize,
    ) {
        for (table, memory) in [(self, SEQUENCE_MEMORY), (engine, ENGINE_MEMORY)] {
            for (place, counts) in table.counts[source.index()].iter_mut().enumerate() {
                counts.tried = counts.tried * memory + f64::from(u8::from(place < tried));
                counts.accepted = counts.accepted * memory + f64::from(u8::from(place < accepted));
            }
        }
    }

    /// Lets the engine's counts weigh less, at the beginning of a sequence.
    pub(super) fn fade(&mut self) {
        for counts in self.counts.iter_mut().flatten() {
            counts.tried *= FADE;
            counts.accepted *= FADE;
        }
    }

    /// Whether, by these counts of the engine, a token of `source` was accepted lately.
    pub(super) fn proves(&self, source: Source) -> bool {
        self.counts[source.index()][0].accepted > PROOF
    }

    /// For each place the chance that it and all before it are accepted, from a sequence's own
    /// counts and the engine's.
    ///
    /// A place without observations is like the one before it, and a sequence is like the engine's
    /// others, as much better or worse as it was at the place before.
    pub(super) fn chances(&self, engine: &Self, source: Source) -> [f64; POSITIONS] {
        let (own, all) = (&self.counts[source.index()], &engine.counts[source.index()]);
        let unknown = UNKNOWN[source.index()];
        let (mut before, mut own_before, mut chance) = (unknown, unknown, 1.0);
        std::array::from_fn(|place| {
            let general = all[place].share(before, ENGINE_WEIGHT);
            let guess = (general * own_before / before.max(1e-9)).min(1.0);
            own_before = own[place].share(guess, SEQUENCE_WEIGHT);
            before = general;
            chance *= own_before;
            chance
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_lean_on_the_engine_until_they_know_better() {
        let (mut engine, mut good) = (Acceptance::default(), Acceptance::default());
        (0..60).for_each(|_| good.book(&mut engine, Source::Model, 4, 4));
        let new = Acceptance::default();
        assert!(new.chances(&engine, Source::Model)[3] > 0.9);
        let mut bad = Acceptance::default();
        (0..40).for_each(|_| bad.book(&mut engine, Source::Model, 1, 0));
        let bad = bad.chances(&engine, Source::Model);
        assert!(bad[0] < 0.3, "{bad:?}");
        assert!(bad[1] < 0.2 * good.chances(&engine, Source::Model)[1], "it is bad at all places");
    }

    #[test]
    fn sources_and_places_are_told_apart() {
        let (mut engine, mut own) = (Acceptance::default(), Acceptance::default());
        for _ in 0..50 {
            own.book(&mut engine, Source::Lookup { matched: 3 }, 3, 2);
            own.book(&mut engine, Source::Lookup { matched: 40 }, 5, 5);
        }
        let chances = |matched| own.chances(&engine, Source::Lookup { matched });
        assert!(chances(2)[1] > 0.9 && chances(2)[2] < 0.1, "the third always fails");
        assert!(chances(16)[4] > 0.9, "a long match does not");
        assert!((own.chances(&engine, Source::Model)[0] - UNKNOWN[0]).abs() < 1e-9);
        assert_eq!(Source::Lookup { matched: 0 }.index(), 1);
    }

    #[test]
    fn what_was_long_ago_is_forgotten() {
        let (mut engine, mut own) = (Acceptance::default(), Acceptance::default());
        (0..1000).for_each(|_| own.book(&mut engine, Source::Model, 1, 1));
        (0..60).for_each(|_| own.book(&mut engine, Source::Model, 1, 0));
        assert!(own.chances(&engine, Source::Model)[0] < 0.3);
        let mut faded = engine.clone();
        (0..40).for_each(|_| faded.fade());
        let new = Acceptance::default().chances(&faded, Source::Model)[0];
        assert!((new - UNKNOWN[0]).abs() < 0.05, "{new}");
    }
}
