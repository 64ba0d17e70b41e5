//! Rotary angle speeds at a sequence length, for every kind of table.
//!
//! Any backend may use this: it runs once a length, not once a number, and every backend must
//! find the same speeds to the last bit. Not here: the rotation.

use crate::program::{RopeDecl, RopeSpeeds};
use std::borrow::Cow;

/// Angle per position of each pair, `[width / 2]`, for a token whose
/// [`crate::StepInput::rope_lens`] entry is `len`.
pub fn speeds(decl: &RopeDecl, len: u32) -> Cow<'_, [f32]> {
    match &decl.speeds {
        RopeSpeeds::Fixed(speeds) => Cow::Borrowed(speeds),
        RopeSpeeds::Switched { short, long, switch } => {
            Cow::Borrowed(if len > *switch { long } else { short })
        }
        RopeSpeeds::DynamicNtk { theta, factor, trained } => {
            let base = ntk_base(decl.width, [*theta, *factor], (*trained, len));
            Cow::Owned(powers(base, decl.width))
        }
    }
}

/// The base stretched to the current length; powers in f64, each result rounded to f32 where
/// model code holds an f32 tensor.
fn ntk_base(width: usize, [theta, factor]: [f32; 2], (trained, len): (u32, u32)) -> f32 {
    let stretch = factor * len.max(trained) as f32 / trained as f32 - (factor - 1.0);
    let exponent = width as f64 / (width as f64 - 2.0);
    theta * f64::from(stretch).powf(exponent) as f32
}

/// `base ^ (-2 i / width)`.
fn powers(base: f32, width: usize) -> Vec<f32> {
    let power = |i: usize| {
        let exponent = (2 * i) as f32 / width as f32;
        f64::from(base).powf(f64::from(exponent)) as f32
    };
    (0..width / 2).map(|i| 1.0 / power(i)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decl(width: usize, speeds: RopeSpeeds) -> RopeDecl {
        RopeDecl { width, speeds, amplitude: 1.0 }
    }

    #[test]
    fn switched_tables_change_after_the_switch() {
        let (short, long) = (vec![1.0], vec![0.5]);
        let decl = decl(2, RopeSpeeds::Switched { short, long, switch: 8 });
        assert_eq!(*speeds(&decl, 8), [1.0]);
        assert_eq!(*speeds(&decl, 9), [0.5]);
    }

    #[test]
    fn dynamic_ntk_is_plain_up_to_the_trained_length() {
        let ntk = RopeSpeeds::DynamicNtk { theta: 10000.0, factor: 4.0, trained: 16 };
        let decl = decl(4, ntk);
        assert_eq!(*speeds(&decl, 1), [1.0, 0.01]);
        assert_eq!(*speeds(&decl, 16), [1.0, 0.01]);
        // Twice the trained length: base 10000 * (4 * 2 - 3)^(4 / 2) = 250000, speed 1 / 500.
        assert_eq!(*speeds(&decl, 32), [1.0, 0.002]);
    }
}
