//! Which instruction set a device runs, and so which its kernels are compiled for.
//!
//! Not here: which devices there are ([`super::devices`]).

/// An NVIDIA instruction set, such as `sm_86`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Arch {
    number: u32,
    own: bool,
}

impl Arch {
    /// `number` as in `sm_86`: for this and later devices of the same generation.
    pub const fn new(number: u32) -> Self {
        Self { number, own: false }
    }

    /// `number` as in `sm_90a`: with instructions that no other device has.
    pub const fn own(number: u32) -> Self {
        Self { number, own: true }
    }

    /// The best one for a device of compute capability `major`.`minor`.
    pub fn of(major: u32, minor: u32) -> Self {
        let number = 10 * major + minor;
        if number == 90 { Self::own(number) } else { Self::new(number) }
    }

    /// As in `sm_86`.
    pub fn number(self) -> u32 {
        self.number
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sm_{}{}", self.number, if self.own { "a" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_get_their_own_set() {
        let name = |major, minor| Arch::of(major, minor).to_string();
        assert_eq!(name(8, 6), "sm_86");
        assert_eq!(name(9, 0), "sm_90a");
        assert_eq!(name(12, 0), "sm_120");
    }
}
