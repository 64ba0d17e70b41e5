//! How many tokens to draft.
mod costs;

pub use costs::{Costs, Curve, DraftCosts};
