//! Guessing ahead: who proposes tokens, how many, and by which rule the verifier accepts them.
//!
//! A cycle is one step of the engine. Before it, [`Length`] says how many tokens each sequence
//! wants; a [`Drafter`] appends them to the sequence as *proposed* tokens; the verifier computes
//! them like any others, and the engine accepts the longest part its [`Rule`] allows. Nothing
//! proposed survives the step, so between steps a sequence is the same as without a draft.
//!
//! Not here: the verifier's step and the choice of tokens ([`crate::engine`],
//! [`crate::sampler`]), a clock: what things cost comes in as data.

pub mod draft_model;
pub mod drafter;
pub mod lookup;
pub mod policy;
pub mod rank;
pub mod rejection;
pub mod self_draft;
pub mod vocab;

pub use draft_model::DraftModel;
pub use drafter::{Drafter, LookupRule};
pub use policy::{Costs, Curve, DraftCosts, Policy};

use crate::sampler::Law;
use crate::sampler::noise::{NoiseKey, Stream};
use lookup::Lookup;
use policy::{Acceptance, Source};

/// How an engine guesses ahead.
#[derive(Debug)]
pub struct Speculation {
    /// Who proposes.
    pub drafter: Drafter,
    /// How many tokens.
    pub length: Length,
    /// When they are accepted.
    pub rule: Rule,
}

/// How many tokens a sequence wants proposed in a cycle.
#[derive(Debug, Clone)]
pub enum Length {
    /// Always the same number; fewer where the drafter, the token budget or the end of the
    /// sequence leaves room for fewer.
    Fixed(usize),
    /// As many as pay by measured costs and acceptance, which may be none.
    Auto(Box<Policy>),
}

/// When a proposed token is accepted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// If it is the very token that the verifier chooses there. Draft and verifier share the
    /// noise of a position, so they often agree when they sample too (Daliri, Musco and Suresh,
    /// arXiv 2408.07978). The text is byte for byte the verifier's own.
    Coupled,
    /// By [`rejection`] sampling: more is accepted where tokens are sampled, and the text has the
    /// verifier's law, but it is another text than without a draft. Greedy text is the same.
    Rejection,
    /// With this probability, whatever it is: for what-if measurements. The text means nothing.
    Simulated(f32),
}

/// Whether a simulated draft is right at `position`.
pub(crate) fn simulated(acceptance: f32, seed: u64, position: u32) -> bool {
    NoiseKey::of(Stream::Coin, seed, position).uniform() < f64::from(acceptance)
}

/// What guessing ahead did for a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpeculationCounts {
    /// Steps in which proposed tokens were verified.
    pub cycles: u64,
    /// Tokens proposed in them.
    pub drafted_tokens: u64,
    /// Of these, tokens that were accepted.
    pub accepted_tokens: u64,
}

/// The drafting side of a sequence.
#[derive(Debug, Clone, Default)]
pub struct DraftState {
    /// Tokens wanted in the next cycle.
    pub wanted: usize,
    /// How many of the sequence's last tokens are proposed and not verified; 0 between steps.
    pub proposed: usize,
    /// The laws they were drawn from, where the rule is [`Rule::Rejection`] and tokens are
    /// sampled; else empty.
    pub laws: Vec<Law>,
    /// Leading tokens whose keys and values the draft model has, in the sequence's own blocks.
    pub computed: usize,
    /// Leading tokens in blocks to which another sequence's draft may be writing, or that it left
    /// half done: while fewer are computed, no draft model follows the sequence.
    pub locked: usize,
    /// Leading full blocks that others know to hold the draft model's part too.
    pub shared: usize,
    /// Whether a draft model is to follow it from its first step on.
    pub follows: bool,
    /// Where its text occurred before, as far as a drafter has asked.
    pub lookup: Lookup,
    /// What it did so far.
    pub counts: SpeculationCounts,
    /// Who proposes its next tokens.
    pub source: Source,
    /// Which of its proposed tokens were accepted, for [`Length::Auto`].
    pub acceptance: Acceptance,
    /// Tokens that the draft model computed in this step beyond one for each it proposed.
    pub caught_up: usize,
    /// Whether [`Length::Auto`] has taken it in.
    pub known: bool,
}
