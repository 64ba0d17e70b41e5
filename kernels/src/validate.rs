//! Every check of what crosses the contract, made once; backends may assume a validated program,
//! step input and weight afterwards and index without checking again.
//!
//! [`program`] checks a lowered [`crate::Program`], [`limits`] what a runner is sized for,
//! [`weight`] a delivered weight against its declaration, [`input`] the arrays of one step.
//!
//! Not here: the meaning of an op ([`crate::reference`]), values of weights and activations.

mod input;
mod program;

pub use input::input;
pub use program::program;

use crate::program::{SlotId, WeightId};
use crate::{Error, Program, StepLimits};
use quant::{Format, Weight};
use std::ops::Range;

/// Checks that a runner of these limits can run at least one token.
///
/// # Errors
/// [`Error::Declaration`] naming the limit that is zero or the product that overflows.
pub fn limits(limits: &StepLimits) -> Result<(), Error> {
    let StepLimits { tokens, sequences, outputs, blocks, block_len, context_len, trace: _ } =
        *limits;
    let all = [
        ("tokens", tokens),
        ("sequences", sequences),
        ("outputs", outputs),
        ("blocks", blocks),
        ("block_len", block_len),
        ("context_len", context_len),
    ];
    let refuse = |name: &str, reason: String| {
        Err(Error::Declaration { declaration: format!("step limit {name}"), reason })
    };
    if let Some((name, _)) = all.iter().find(|(_, value)| *value == 0) {
        return refuse(name, "expected at least 1, found 0".to_owned());
    }
    if let Some((name, value)) = all.iter().find(|(_, value)| u32::try_from(*value).is_err()) {
        return refuse(name, format!("expected at most {}, found {value}", u32::MAX));
    }
    Ok(())
}

/// Checks that a slot's rows can be read after a step.
///
/// # Errors
/// [`Error::Input`] if the limits ask for no trace, or there is no such slot.
pub fn traced(program: &Program, limits: &StepLimits, slot: SlotId) -> Result<(), Error> {
    let refuse = |reason: String| Err(Error::Input { reason });
    if !limits.trace {
        return refuse("slots can be read only if the limits ask for a trace".to_owned());
    }
    let most = program.slots.len();
    if slot.index() >= most {
        return refuse(format!("expected slot ids below {most}, found {}", slot.0));
    }
    Ok(())
}

/// Checks rows `rows` of a weight, as delivered, against declaration `id`.
///
/// A weight declared as act-order may arrive without a permutation (its group indices were
/// ascending after all); the reverse is an error.
///
/// # Errors
/// [`Error::Weight`] with the declared and the delivered shape or format.
pub fn weight(
    program: &Program,
    id: WeightId,
    rows: Range<usize>,
    weight: &Weight<'_>,
) -> Result<(), Error> {
    let Some(decl) = program.weights.get(id.index()) else {
        let (expected, found) = (format!("an id below {}", program.weights.len()), id.0);
        return Err(Error::Weight {
            label: format!("#{found}"),
            expected,
            found: found.to_string(),
        });
    };
    let refuse = |expected: String, found: String| {
        Err(Error::Weight { label: decl.label.clone(), expected, found })
    };
    let expected = [rows.len(), decl.shape[1]];
    if weight.shape() != expected {
        return refuse(format!("shape {expected:?}"), format!("{:?}", weight.shape()));
    }
    let found = weight.format();
    if !fits(decl.format, found) {
        return refuse(format!("format {}", decl.format), found.to_string());
    }
    Ok(())
}

/// Whether a weight of format `found` may stand where `declared` is expected.
fn fits(declared: Format, found: Format) -> bool {
    match (declared, found) {
        (
            Format::Grouped { bits, group, act_order: true },
            Format::Grouped { bits: found_bits, group: found_group, act_order: _ },
        ) => bits == found_bits && group == found_group,
        _ => declared == found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{SlotId, WeightDecl};
    use quant::{Bits, Dense, FloatType, Grouped, GroupedParts, GroupedShape};

    const GROUPED: Format = Format::Grouped { bits: Bits::Four, group: 4, act_order: false };
    const ACT_ORDER: Format = Format::Grouped { bits: Bits::Four, group: 4, act_order: true };

    fn declared(format: Format) -> Program {
        let decl = WeightDecl::new("w", [2, 8], format);
        Program {
            weights: vec![decl],
            slots: vec![],
            ropes: vec![],
            kv: vec![],
            steps: vec![],
            logits: SlotId(0),
        }
    }

    fn grouped(perm: Option<Vec<u32>>) -> Weight<'static> {
        let shape = GroupedShape { n: 2, k: 8, group: 4, bits: Bits::Four };
        let parts = GroupedParts {
            shape,
            codes: vec![0; 8],
            scales: vec![1.0; 4],
            zeros: vec![8; 4],
            perm,
        };
        Weight::Grouped(Grouped::new("w", parts).unwrap())
    }

    fn refusal(format: Format, found: &Weight<'_>) -> String {
        weight(&declared(format), WeightId(0), 0..2, found).unwrap_err().to_string()
    }

    #[test]
    fn a_weight_must_be_as_declared() {
        let swapped = || Some(vec![1, 0, 2, 3, 4, 5, 6, 7]);
        weight(&declared(GROUPED), WeightId(0), 0..2, &grouped(None)).unwrap();
        weight(&declared(ACT_ORDER), WeightId(0), 0..2, &grouped(None)).unwrap();
        weight(&declared(ACT_ORDER), WeightId(0), 0..2, &grouped(swapped())).unwrap();
        assert_eq!(
            refusal(GROUPED, &grouped(swapped())),
            "weight w: expected format w4g4, found w4g4 act-order"
        );
        assert_eq!(
            refusal(Format::Dense(FloatType::F16), &grouped(None)),
            "weight w: expected format f16, found w4g4"
        );
        let short = Weight::Dense(Dense::from_f32([2, 4], &[0.0; 8]));
        let wanted = Format::Dense(FloatType::F32);
        assert_eq!(refusal(wanted, &short), "weight w: expected shape [2, 8], found [2, 4]");
        assert!(weight(&declared(GROUPED), WeightId(3), 0..2, &short).is_err());
    }

    #[test]
    fn a_limit_of_zero_is_named() {
        let good = StepLimits {
            tokens: 4,
            sequences: 1,
            outputs: 4,
            blocks: 2,
            block_len: 16,
            context_len: 32,
            trace: false,
        };
        limits(&good).unwrap();
        let err = limits(&StepLimits { blocks: 0, ..good }).unwrap_err().to_string();
        assert!(err.contains("step limit blocks: expected at least 1"), "{err}");
        assert!(limits(&StepLimits { tokens: 1 << 40, ..good }).is_err());
    }
}
