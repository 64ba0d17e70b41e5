//! What can be typed about guessing ahead: who drafts, how much, by which rule. No behaviour.

use clap::{Args, ValueEnum};
use std::fmt;

/// How to guess ahead; shared by `run` and `verify`.
#[derive(Debug, Args)]
pub struct SpeculationArgs {
    /// Who proposes tokens: the folder of a smaller model with the same vocabulary, `demo-draft`,
    /// or `off`; default: demo-draft where no MODEL is named, else off. The text is the same
    #[arg(long, value_name = "DIR|off", value_parser = draft)]
    pub draft: Option<DraftName>,
    /// Tokens to propose in a cycle, 1 to 64, or `off`; default: 4
    #[arg(long, value_name = "N|off", value_parser = draft_tokens)]
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
    /// A model: a folder or a built-in one.
    Model(String),
}

impl fmt::Display for DraftName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Model(name) => f.write_str(name),
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

/// Any other word names a model; whether there is one shows when it is opened.
fn draft(text: &str) -> Result<DraftName, String> {
    match text.trim() {
        "" => Err("expected a model folder, demo-draft or off".to_owned()),
        "off" => Ok(DraftName::Off),
        name => Ok(DraftName::Model(name.to_owned())),
    }
}

fn draft_tokens(text: &str) -> Result<DraftTokens, String> {
    if text.trim() == "off" {
        return Ok(DraftTokens::Off);
    }
    let tokens = text.trim().parse().ok().filter(|n| (1..=MOST_DRAFTED).contains(n));
    let refused = || format!("expected a number in 1..={MOST_DRAFTED}, or off");
    tokens.map(DraftTokens::Fixed).ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_are_models_or_off() {
        assert_eq!(draft("off"), Ok(DraftName::Off));
        assert_eq!(draft("./m"), Ok(DraftName::Model("./m".to_owned())));
        assert!(draft(" ").is_err());
        assert_eq!(draft("demo-draft").map(|d| d.to_string()), Ok("demo-draft".to_owned()));
    }

    #[test]
    fn lengths_are_numbers_in_range_or_off() {
        assert_eq!(draft_tokens("off"), Ok(DraftTokens::Off));
        assert_eq!(draft_tokens("64"), Ok(DraftTokens::Fixed(64)));
        for wrong in ["0", "65", "-1", "four"] {
            assert!(draft_tokens(wrong).is_err_and(|e| e.contains("1..=64")), "{wrong}");
        }
    }
}
