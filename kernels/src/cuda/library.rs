//! Typed functions out of a shared library that is opened at run time.
//!
//! [`super::nvrtc`] (the compiler) names its functions with [`functions`]. Not here: where libraries
//! lie ([`super::places`]), what their functions do, the driver ([`super::api`]).

/// Declares a table of C functions that return a status, and `load`, which takes them out of a
/// library and fails where one is missing.
macro_rules! functions {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $symbol:literal ($($arg:ty),*);)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(super) struct $name {
            $(pub(super) $field: unsafe extern "system" fn($($arg),*) -> std::ffi::c_int,)*
        }

        impl $name {
            /// # Safety
            /// The library's functions of these names have the declared parameters, and it is
            /// never closed.
            unsafe fn load(library: &libloading::Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the caller answers for the type.
                        *unsafe {
                            library.get::<unsafe extern "system" fn($($arg),*) -> std::ffi::c_int>(
                                $symbol,
                            )
                        }?
                    },)*
                })
            }
        }
    };
}

pub(super) use functions;
