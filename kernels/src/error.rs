//! The one error type of this crate.

/// Why a program cannot be built or a step cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The program breaks a rule of the contract.
    #[error("program step {step} ({label}): {reason}")]
    Program {
        /// Index of the step.
        step: usize,
        /// Its label.
        label: String,
        /// The rule that is broken, with what was expected and found.
        reason: String,
    },
    /// A declaration (weight, slot, rope, KV layer) breaks a rule of the contract.
    #[error("program declaration {declaration}: {reason}")]
    Declaration {
        /// Which declaration.
        declaration: String,
        /// The rule that is broken.
        reason: String,
    },
    /// A delivered weight is not what the program declared.
    #[error("weight {label}: expected {expected}, found {found}")]
    Weight {
        /// Label of the declaration.
        label: String,
        /// Declared shape or format.
        expected: String,
        /// Delivered shape or format.
        found: String,
    },
    /// A weight could not be delivered.
    #[error("weight {label} could not be loaded")]
    Source {
        /// Label of the declaration.
        label: String,
        /// What the source says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A step's arrays contradict each other or exceed the limits the runner was built for.
    #[error("step input: {reason}")]
    Input {
        /// Which array, expected and found.
        reason: String,
    },
    /// This machine cannot give what was asked for.
    #[error("device {device}: {reason}")]
    Device {
        /// Name of the device or instruction set.
        device: String,
        /// What is missing and what to do.
        reason: String,
    },
}
