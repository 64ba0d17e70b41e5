//! Drafts made of the verifier's own checkpoint: fewer layers, fewer bits.
//!
//! Here are the text that asks for one and the choice of the layers that stay. Not here: loading
//! ([`crate::model::Model::open_with`] with [`SelfDraft::options`]). Input: the text behind
//! `self:` of a command line.

use crate::model::{Head, ModelOptions};
use quant::Bits;
use std::str::FromStr;

/// How a draft differs from the checkpoint it is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SelfDraft {
    /// How many layers are kept, at least 1; none is all.
    pub layers: Option<usize>,
    /// Code width of the matrices inside the layers; none is the file's.
    pub bits: Option<Bits>,
}

impl SelfDraft {
    /// Options to open the checkpoint with; the head follows its own rule.
    pub fn options(self, head: Head) -> ModelOptions {
        ModelOptions { head, layers: self.layers, bits: self.bits }
    }
}

/// Reads `layers=4`, `bits=4` or `layers=4,bits=4`.
impl FromStr for SelfDraft {
    type Err = SelfDraftError;

    fn from_str(text: &str) -> Result<Self, SelfDraftError> {
        let fail = |reason: String| SelfDraftError { text: text.to_owned(), reason };
        let mut draft = Self::default();
        for setting in text.split(',') {
            let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
            let again = || fail(format!("{key} is given twice"));
            match key {
                "layers" if draft.layers.is_some() => return Err(again()),
                "bits" if draft.bits.is_some() => return Err(again()),
                "layers" => draft.layers = Some(layers(value).map_err(fail)?),
                "bits" => draft.bits = Some(bits(value).map_err(fail)?),
                _ => return Err(fail(format!("{setting:?} is no setting"))),
            }
        }
        Ok(draft)
    }
}

fn layers(value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(format!("layers is {value:?}, expected a number from 1")),
    }
}

fn bits(value: &str) -> Result<Bits, String> {
    match value {
        "4" => Ok(Bits::Four),
        "8" => Ok(Bits::Eight),
        "2" | "3" => Err(format!(
            "bits is {value}: such codes are kept in four bits, so they would be as slow as \
             bits=4 and guess worse"
        )),
        _ => Err(format!("bits is {value:?}, expected 4 or 8")),
    }
}

/// Why a text asks for no self-draft.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("self-draft {text:?}: {reason}; write layers=N, bits=4 or bits=8, or both with a comma")]
pub struct SelfDraftError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Which of `all` layers a draft of `kept` layers keeps, ascending: the first and the last, and
/// the others spread evenly between them; the first where it is the only one. `kept` in 1..=all.
///
/// No rule is best for every model; this one is on average. Over 21 choices of N from trained
/// models of 2 to 8 layers, sum(min(p, q)) with the whole model has the mean 0.34, against 0.28 for
/// the first N layers, 0.30 for the first N - 1 and the last, 0.32 for as many from either end. On
/// the demo verifier of 6 layers it is 0.33, 0.58, 0.69 and 0.81 for N from 2 to 5: the most of
/// all choices.
pub fn kept_layers(all: usize, kept: usize) -> Vec<usize> {
    // Gaps between kept layers; the quotient below is rounded to nearest.
    let gaps = kept.saturating_sub(1).max(1);
    (0..kept).map(|i| (2 * i * all.saturating_sub(1) + gaps) / (2 * gaps)).collect()
}

#[cfg(test)]
#[path = "self_draft_tests.rs"]
mod tests;
