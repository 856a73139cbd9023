//! One body, compiled for each width of vectors that x86 machines have, and picked at run time. Refuses to change a bit by it.
//!
//! The one idea: a body in plain Rust has separate multiplications and additions, which the compiler never contracts into one
//! rounding; so the same source gives the same bits with 128-bit, 256-bit and 512-bit vectors, and on other machines.

/// Defines a function whose body is compiled for AVX-512, for AVX2 and for every machine of the target.
///
/// What the body calls gets the wide vectors only where it is inlined, and a closure handed to an iterator often is not: write `for`
/// loops over slices, and mark the functions that they call `#[inline(always)]`.
macro_rules! vectorised {
    ($(#[$attribute:meta])* $vis:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $output:ty)? $body:block) => {
        $(#[$attribute])*
        $vis fn $name($($argument: $type),*) $(-> $output)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($argument: $type),*) $(-> $output)? {
                    body($($argument),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) $(-> $output)? {
                    body($($argument),*)
                }

                if std::arch::is_x86_feature_detected!("avx512f") {
                    // SAFETY: the machine has AVX-512F, the one thing that this safe body was compiled to need.
                    return unsafe { avx512($($argument),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the machine has AVX2, the one thing that this safe body was compiled to need.
                    return unsafe { avx2($($argument),*) };
                }
            }
            body($($argument),*)
        }
    };
}

pub(crate) use vectorised;
