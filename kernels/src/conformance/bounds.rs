//! Every result lies within its bound, and the bounds are not so loose that they say nothing.

use super::case::Case;
use super::oracle::{Expected, UNIT, expected};
use super::session::{Schedule, run};
use super::{Tested, backends, cases};
use std::collections::BTreeMap;

/// The largest error of a group of cases as a part of what is allowed.
type Worst = BTreeMap<String, f64>;

/// What the reference may be off by: it rounds once, after f64 sums.
pub(super) fn reference(expected: &Expected) -> f64 {
    UNIT * expected.once
}

/// What the CPU may be off by: f32 arithmetic, int8 activations of quantized linears, f16 KV.
///
/// The factor on f32 arithmetic is one: the oracle counts every rounding where it happens, and a
/// second factor here would count them twice. Half a step of int8 has a little more room for the
/// rounding of the step itself.
pub(super) fn cpu(expected: &Expected) -> f64 {
    UNIT * expected.many + 1.0001 * expected.int8 + expected.f16
}

/// What CUDA may be off by: as the CPU, and what tensor cores round beyond it; where they multiply weights
/// of two bytes, what that alone rounds.
pub(super) fn cuda(expected: &Expected) -> f64 {
    // The bias is added with one rounding.
    let all = || cpu(expected) + expected.tensor;
    expected.halves.map_or_else(all, |halves| UNIT * expected.once + halves)
}

/// Measures a case against its bound; anything beyond fails with its place.
fn measure(tested: &Tested, case: &Case) -> f64 {
    let rows = run(tested.backend.as_ref(), case, Schedule::Whole, false);
    let mut worst: f64 = 0.0;
    for sequence in 0..case.sequences.len() {
        for (position, row) in expected(case, sequence).iter().enumerate() {
            for (column, (want, found)) in row.iter().zip(&rows[&(sequence, position)]).enumerate()
            {
                let error = (f64::from(*found) - want.value).abs();
                // Numbers below the normal range of f32 lose digits.
                let allowed = (tested.allowed)(want) + f64::from(f32::MIN_POSITIVE);
                assert!(
                    error <= allowed,
                    "{} on {}: sequence {sequence} position {position} column {column}: \
                     expected {} within {allowed:e}, found {found} ({error:e} off)",
                    case.name,
                    tested.name,
                    want.value,
                );
                worst = worst.max(error / allowed);
            }
        }
    }
    worst
}

/// Measures all cases, prints measured / allowed for each and returns the worst of each group.
fn measure_all(tested: &Tested) -> Worst {
    let mut worst = Worst::new();
    for case in cases::all() {
        let part = measure(tested, &case);
        println!("{:<14} {:.3} of allowed  {}", tested.name, part, case.name);
        let group = case.name.split(':').next().unwrap_or_default().to_owned();
        let most = worst.entry(group).or_default();
        *most = most.max(part);
    }
    worst
}

/// Fails if a bound is more than a hundred times what is needed.
fn not_too_loose(tested: &Tested, worst: &Worst) {
    for (group, part) in worst {
        println!("{:<14} {part:.3} of allowed  {group}: worst", tested.name);
        let exact = group.ends_with("exact");
        assert!(exact || *part > 0.01, "{group} on {}: {part} of allowed", tested.name);
    }
}

#[test]
fn results_lie_within_their_bounds() {
    for tested in backends() {
        let worst = measure_all(&tested);
        not_too_loose(&tested, &worst);
    }
}
