//! The attribute `#[vmlab::test]`, which `vmlab` re-exports: use it from there.

mod attribute;
mod expand;
mod value;

use proc_macro::TokenStream;

/// Makes a function a test that runs in a virtual machine.
///
/// What remains is an ordinary `#[test]`. On the host it starts a VM, and in that the same test program with
/// this test alone; there it runs the function. What the function writes, how it panics and where comes back as
/// if it had run on the host. Other attributes, such as `#[should_panic]` and `#[ignore]`, mean what they
/// always do.
///
/// ```ignore
/// use vmlab::prelude::*;
///
/// #[vmlab::test(kernel = "debian:6.12", memory = "512M")]
/// fn the_guest_has_its_own_kernel(ctx: &Ctx) {
///     assert!(ctx.kernel().starts_with("6.12"));
/// }
///
/// #[vmlab::test(host)]
/// fn from_the_outside(vm: &mut Vm, recorder: &Recorder) -> Result<()> {
///     let since = std::time::Instant::now();
///     assert!(vm.exec(["true"])?.status.success());
///     recorder.measure("round trip", since.elapsed().as_secs_f64() * 1000.0, "ms");
///     Ok(())
/// }
/// ```
///
/// The function takes nothing or a `&Ctx`; with `host`, a `&mut Vm` that has started, or a `VmBuilder`, and a
/// `&Recorder` behind either, if it has something to measure. It may be `async`, and returns nothing, a `Result`
/// whose error is `Debug`, or an `ExitCode`.
///
/// All keys of the attribute are in `docs/rust-tests.md`.
#[proc_macro_attribute]
pub fn test(attribute: TokenStream, item: TokenStream) -> TokenStream {
    expand::test(attribute.into(), item.into())
        .unwrap_or_else(|error| error.into_compile_error())
        .into()
}
