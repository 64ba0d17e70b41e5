//! What can be typed about guessing ahead: who drafts, how much, by which rule. No behaviour.

use clap::{Args, ValueEnum};
use engine::speculation::self_draft::SelfDraft;
use std::fmt;

/// How to guess ahead; shared by `run` and `verify`.
#[derive(Debug, Args)]
pub struct SpeculationArgs {
    /// Who proposes tokens: DIR (a smaller model with the same vocabulary, or demo-draft),
    /// lookup (what followed where the text occurred before), DIR,lookup (lookup where the match
    /// is long, else the model), self:layers=N, self:bits=4 or 8 (the model itself with fewer
    /// layers or bits), off. Default: demo-draft where no MODEL is named, else off. The text
    /// stays the same
    #[arg(long, value_name = "DRAFT", value_parser = draft)]
    pub draft: Option<DraftName>,
    /// Tokens to propose in a cycle: auto (as many as pay by the measured costs and acceptance, or
    /// none), a number in 1..=64, or off; default: auto
    #[arg(long, value_name = "auto|N|off", value_parser = draft_tokens)]
    pub draft_tokens: Option<DraftTokens>,
    /// When a proposed token is accepted; default: coupled
    #[arg(long, value_enum)]
    pub acceptance_rule: Option<RuleName>,
}

/// Who drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DraftName {
    /// Nobody.
    Off,
    /// The text so far.
    Lookup,
    /// A model.
    Model(ModelName),
    /// The text so far where it helps, else a model.
    Cascade(ModelName),
}

/// A draft model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelName {
    /// A folder or a built-in model.
    Named(String),
    /// The verifier with fewer layers or bits.
    OfItself(SelfDraft),
}

/// As it is typed.
impl fmt::Display for DraftName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Lookup => f.write_str(LOOKUP),
            Self::Model(model) => model.fmt(f),
            Self::Cascade(model) => write!(f, "{model},{LOOKUP}"),
        }
    }
}

/// As it is typed.
impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::OfItself(SelfDraft { layers, bits }) => {
                let layers = layers.map(|layers| format!("layers={layers}"));
                let bits = bits.map(|bits| format!("bits={}", bits.count()));
                let settings: Vec<String> = layers.into_iter().chain(bits).collect();
                write!(f, "{OF_ITSELF}{}", settings.join(","))
            }
        }
    }
}

/// How many tokens are drafted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DraftTokens {
    /// None.
    Off,
    /// So many in each cycle.
    Fixed(usize),
    /// As many as pay.
    Auto,
}

/// Rules of acceptance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RuleName {
    /// A proposed token stands if the verifier chooses the same: the text never changes.
    Coupled,
    /// By rejection sampling: more is accepted where tokens are sampled, and the text follows the
    /// same law, but it is another text than without a draft.
    Rejection,
}

/// Most tokens that may be drafted in a cycle.
pub(crate) const MOST_DRAFTED: usize = 64;

const LOOKUP: &str = "lookup";
const OF_ITSELF: &str = "self:";

/// Any other word names a model; whether there is one shows when it is opened.
pub(super) fn draft(text: &str) -> Result<DraftName, String> {
    let text = text.trim();
    match text {
        "off" => return Ok(DraftName::Off),
        LOOKUP => return Ok(DraftName::Lookup),
        _ => {}
    }
    let cascade = text.strip_suffix(LOOKUP).and_then(|rest| rest.strip_suffix(','));
    let name = cascade.unwrap_or(text);
    if name.is_empty() {
        return Err("expected a model folder, demo-draft, lookup, self:... or off".to_owned());
    }
    let model = match name.strip_prefix(OF_ITSELF) {
        Some(settings) => ModelName::OfItself(settings.parse().map_err(|e| format!("{e}"))?),
        None => ModelName::Named(name.to_owned()),
    };
    Ok(if cascade.is_some() { DraftName::Cascade(model) } else { DraftName::Model(model) })
}

/// A draft that is a model by itself.
pub(super) fn draft_model(text: &str) -> Result<ModelName, String> {
    match draft(text)? {
        DraftName::Model(name) => Ok(name),
        DraftName::Off | DraftName::Lookup | DraftName::Cascade(_) => {
            Err("expected a model folder, demo-draft or self:...".to_owned())
        }
    }
}

pub(super) fn draft_tokens(text: &str) -> Result<DraftTokens, String> {
    match text.trim() {
        "off" => return Ok(DraftTokens::Off),
        "auto" => return Ok(DraftTokens::Auto),
        _ => {}
    }
    let tokens = text.trim().parse().ok().filter(|n| (1..=MOST_DRAFTED).contains(n));
    let refused = || format!("expected auto, a number in 1..={MOST_DRAFTED}, or off");
    tokens.map(DraftTokens::Fixed).ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_print_as_they_are_typed() {
        let model = ModelName::Named("./m".to_owned());
        assert_eq!(draft("./m"), Ok(DraftName::Model(model.clone())));
        assert_eq!(draft("./m,lookup"), Ok(DraftName::Cascade(model)));
        let all = ["off", "lookup", "./m", "a,b", "./m,lookup", "self:layers=2,bits=4"];
        for text in all.into_iter().chain(["self:bits=8,lookup"]) {
            assert_eq!(draft(text).map(|d| d.to_string()), Ok(text.to_owned()));
        }
        for wrong in [" ", ",lookup", "self:", "self:layers=0", "self:width=3"] {
            assert!(draft(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn lengths_are_numbers_in_range_or_off() {
        assert_eq!(draft_tokens("off"), Ok(DraftTokens::Off));
        assert_eq!(draft_tokens("auto"), Ok(DraftTokens::Auto));
        assert_eq!(draft_tokens("64"), Ok(DraftTokens::Fixed(64)));
        for wrong in ["0", "65", "-1", "four"] {
            assert!(draft_tokens(wrong).is_err_and(|e| e.contains("1..=64")), "{wrong}");
        }
    }
}
