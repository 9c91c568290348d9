//! From the attribute and its function to a test of the standard harness.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote};
use syn::{Error, FnArg, Ident, ItemFn, Result, ReturnType, Type, parse2};

use crate::attribute::Attribute;
use crate::value::Text;

/// Attributes that the standard harness or the compiler has to see at the test itself.
const OF_THE_TEST: [&str; 5] = ["should_panic", "ignore", "cfg", "cfg_attr", "doc"];

/// What the function takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Argument {
    Nothing,
    Ctx,
    Vm,
    Builder,
}

pub(crate) fn test(attribute: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let function: ItemFn = parse2(item)?;
    let attribute: Attribute = parse2(attribute)?;
    let argument = argument(&function, &attribute)?;
    check(&function, &attribute, argument)?;
    Ok(match attribute.kernels.len() {
        0 | 1 => one(function, &attribute, argument),
        _ => under_each_kernel(function, &attribute, argument),
    })
}

fn argument(function: &ItemFn, attribute: &Attribute) -> Result<Argument> {
    let inputs = &function.sig.inputs;
    let of_host = "a `host` test takes a `&mut Vm` that has started, or a `VmBuilder`";
    let Some(first) = inputs.first() else {
        return match attribute.span_of("host").filter(|_| attribute.host) {
            Some(host) => Err(Error::new(host, of_host)),
            None => Ok(Argument::Nothing),
        };
    };
    match (inputs.iter().nth(1), inputs.iter().nth(2)) {
        (Some(second), _) if !attribute.host => {
            let why = "a test in the guest takes one argument at most; a `&Ctx` has a `recorder()`";
            return Err(Error::new_spanned(second, why));
        }
        (Some(second), _) if !is_shared_reference(second) => {
            let why = "the second argument of a `host` test is a `&Recorder`";
            return Err(Error::new_spanned(second, why));
        }
        (_, Some(third)) => {
            return Err(Error::new_spanned(third, "a `host` test takes two arguments at most"));
        }
        _ => {}
    }
    let FnArg::Typed(typed) = first else {
        return Err(Error::new_spanned(first, "a test is no method"));
    };
    match (&*typed.ty, attribute.host) {
        (Type::Reference(reference), true) if reference.mutability.is_some() => Ok(Argument::Vm),
        (Type::Path(_), true) => Ok(Argument::Builder),
        (other, true) => {
            let why = format!("{of_host}; a `Ctx` is of tests that run in the guest");
            Err(Error::new_spanned(other, why))
        }
        (Type::Reference(reference), false) if reference.mutability.is_none() => Ok(Argument::Ctx),
        (other, false) => Err(Error::new_spanned(
            other,
            "a test in the guest takes nothing or a `&Ctx`; with `#[vmlab::test(host)]`, it stays on \
             the host and takes a `&mut Vm` or a `VmBuilder`",
        )),
    }
}

fn is_shared_reference(argument: &FnArg) -> bool {
    let FnArg::Typed(typed) = argument else { return false };
    matches!(&*typed.ty, Type::Reference(reference) if reference.mutability.is_none())
}

fn check(function: &ItemFn, attribute: &Attribute, argument: Argument) -> Result<()> {
    let signature = &function.sig;
    if !signature.generics.params.is_empty() {
        return Err(Error::new_spanned(&signature.generics, "a test has no type parameters"));
    }
    if let Some(token) = &signature.unsafety {
        return Err(Error::new_spanned(token, "a test is not `unsafe`"));
    }
    if let Some(token) = &signature.constness {
        return Err(Error::new_spanned(token, "a test is not `const`"));
    }
    if let Some(token) = &signature.abi {
        return Err(Error::new_spanned(token, "a test is no `extern` function"));
    }
    if let Some(other) = function.attrs.iter().find(|attribute| attribute.path().is_ident("test")) {
        let why = "`#[vmlab::test]` makes it a test already; remove `#[test]`";
        return Err(Error::new_spanned(other, why));
    }
    let panics = function.attrs.iter().find(|attr| attr.path().is_ident("should_panic"));
    if let (Some(panics), ReturnType::Type(_, _)) = (panics, &signature.output) {
        let why = "a function that returns something cannot be `#[should_panic]`: use `expect_err`";
        return Err(Error::new_spanned(panics, why));
    }
    if let (Some(_), Some(expect)) = (panics, attribute.span_of("expect_err")) {
        let why = "`expect_err` and `#[should_panic]` cannot both be there: both turn the result";
        return Err(Error::new(expect, why));
    }
    if argument == Argument::Builder {
        for key in ["fail_on", "expect_event"] {
            if let Some(span) = attribute.span_of(key) {
                let why = format!(
                    "`{key}` needs the VM of the test, and one with a `VmBuilder` may have several"
                );
                return Err(Error::new(span, why));
            }
        }
    }
    Ok(())
}

/// A test beside which nothing else has to be.
fn one(function: ItemFn, attribute: &Attribute, argument: Argument) -> TokenStream {
    let (of_test, inner) = parted(function);
    let (name, visibility) = (inner.sig.ident.clone(), inner.vis.clone());
    let settings = settings(attribute, attribute.kernels.first(), &of_test);
    let call = call(&inner, &quote!(#name), argument);
    let body = run(&name, &settings, &call, argument);
    let inner = ItemFn { vis: syn::Visibility::Inherited, ..inner };
    quote! {
        #(#of_test)*
        #[::core::prelude::v1::test]
        #visibility fn #name() {
            #inner
            #body
        }
    }
}

/// A module of the function's name, with a test for each kernel. The function itself stays beside it: modules
/// and functions are in different namespaces.
fn under_each_kernel(function: ItemFn, attribute: &Attribute, argument: Argument) -> TokenStream {
    let (of_test, inner) = parted(function);
    let (module, visibility) = (inner.sig.ident.clone(), inner.vis.clone());
    let conditions: Vec<_> =
        of_test.iter().filter(|attr| attr.path().is_ident("cfg")).cloned().collect();
    let call = call(&inner, &quote!(super::#module), argument);
    let mut names: Vec<String> = Vec::new();
    let tests: Vec<TokenStream> = attribute
        .kernels
        .iter()
        .map(|kernel| {
            let name = identifier(kernel, &names);
            names.push(name.to_string());
            let body = run(&name, &settings(attribute, Some(kernel), &of_test), &call, argument);
            quote! {
                #(#of_test)*
                #[::core::prelude::v1::test]
                fn #name() { #body }
            }
        })
        .collect();
    quote! {
        #(#conditions)*
        #[cfg(test)]
        #inner
        #(#conditions)*
        #[cfg(test)]
        #[allow(non_snake_case)]
        #visibility mod #module {
            #(#tests)*
        }
    }
}

/// Takes the test's own attributes from a function.
fn parted(mut function: ItemFn) -> (Vec<syn::Attribute>, ItemFn) {
    let is_of_test =
        |attribute: &syn::Attribute| OF_THE_TEST.iter().any(|name| attribute.path().is_ident(name));
    let (of_test, rest) = std::mem::take(&mut function.attrs).into_iter().partition(is_of_test);
    function.attrs = rest;
    (of_test, function)
}

/// Calls the function, and gives why it failed, if it did.
fn call(function: &ItemFn, path: &TokenStream, argument: Argument) -> TokenStream {
    let recorded = function.sig.inputs.len() > 1;
    let (parameter, mut given) = match argument {
        Argument::Nothing => (quote!(_: &::vmlab::testing::Ctx), quote!()),
        Argument::Ctx => (quote!(ctx: &::vmlab::testing::Ctx), quote!(ctx)),
        Argument::Vm => {
            (quote!(vm: &mut ::vmlab::Vm, _recorder: &::vmlab::testing::Recorder), quote!(vm))
        }
        Argument::Builder => (
            quote!(builder: ::vmlab::VmBuilder, _recorder: &::vmlab::testing::Recorder),
            quote!(builder),
        ),
    };
    if recorded {
        given = quote!(#given, _recorder);
    }
    let called = match function.sig.asyncness {
        Some(_) => quote!(::vmlab::testing::block_on(#path(#given))),
        None => quote!(#path(#given)),
    };
    quote!(|#parameter| ::vmlab::testing::Returned::failure(#called))
}

fn run(
    name: &Ident,
    settings: &TokenStream,
    call: &TokenStream,
    argument: Argument,
) -> TokenStream {
    let run = match argument {
        Argument::Nothing | Argument::Ctx => format_ident!("in_guest"),
        Argument::Vm => format_ident!("with_vm"),
        Argument::Builder => format_ident!("with_builder"),
    };
    quote! {
        const TEST: ::vmlab::testing::Test = ::vmlab::testing::Test {
            module: ::core::module_path!(),
            name: ::core::stringify!(#name),
            package: ::core::env!("CARGO_PKG_NAME"),
            manifest_dir: ::core::env!("CARGO_MANIFEST_DIR"),
            settings: #settings,
        };
        #[allow(clippy::unit_arg)]
        ::vmlab::testing::#run(&TEST, #call)
    }
}

/// What the panic that a test should end in has to have in its message, if it should.
fn expected_panic(of_test: &[syn::Attribute]) -> Option<String> {
    let attribute = of_test.iter().find(|attribute| attribute.path().is_ident("should_panic"))?;
    let text = |expression: &syn::Expr| match expression {
        syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
        _ => None,
    };
    // What is wrong with it, the compiler says.
    let expected = match &attribute.meta {
        syn::Meta::Path(_) => None,
        syn::Meta::NameValue(pair) => text(&pair.value),
        syn::Meta::List(list) => {
            list.parse_args::<syn::MetaNameValue>().ok().and_then(|pair| text(&pair.value))
        }
    };
    Some(expected.unwrap_or_default())
}

fn settings(
    attribute: &Attribute,
    kernel: Option<&Text>,
    of_test: &[syn::Attribute],
) -> TokenStream {
    let text = |text: Option<&Text>| match text {
        Some(Text { value, .. }) => quote!(::core::option::Option::Some(#value)),
        None => quote!(::core::option::Option::None),
    };
    let values = |texts: &[Text]| texts.iter().map(|text| text.value.clone()).collect::<Vec<_>>();
    let mut fields = Vec::new();
    let mut field = |name: &str, value: TokenStream| {
        let name = Ident::new(name, Span::call_site());
        fields.push(quote!(#name: #value));
    };
    field("kernel", text(kernel));
    field("named_by_kernel", {
        let several = attribute.kernels.len() > 1;
        quote!(#several)
    });
    field(
        "cpus",
        match attribute.cpus {
            Some(cpus) => quote!(::core::option::Option::Some(#cpus)),
            None => quote!(::core::option::Option::None),
        },
    );
    field("topology", text(attribute.topology.as_ref()));
    field("memory", text(attribute.memory.as_ref()));
    field("network", text(attribute.net.as_ref()));
    field("timeout", text(attribute.timeout.as_ref()));
    field("expect_event", text(attribute.expect_event.as_ref()));
    field("rootfs", text(attribute.rootfs.as_ref()));
    field("image", text(attribute.image.as_ref()));
    field("user", text(attribute.user.as_ref()));
    field(
        "fail_on",
        match &attribute.fail_on {
            Some(kinds) => {
                let kinds = values(kinds);
                quote!(::core::option::Option::Some(&[#(#kinds),*]))
            }
            None => quote!(::core::option::Option::None),
        },
    );
    let expected = expected_panic(of_test);
    field(
        "should_panic",
        match &expected {
            Some(expected) => quote!(::core::option::Option::Some(#expected)),
            None => quote!(::core::option::Option::None),
        },
    );
    let expect_err = attribute.expect_err;
    field("expect_err", quote!(#expect_err));
    let append = values(&attribute.append);
    field("append", quote!(&[#(#append),*]));
    let shares = attribute.shares.iter().map(|share| {
        let (host, guest, writable) =
            (&share.host.value, text(share.guest.as_ref()), share.writable);
        quote!(::vmlab::testing::SharedDir { host: #host, guest: #guest, writable: #writable })
    });
    field("shares", quote!(&[#(#shares),*]));
    let disks = attribute.disks.iter().map(|disk| {
        let options = disk.iter().map(|(name, value)| quote!((#name, #value)));
        quote!(&[#(#options),*])
    });
    field("disks", quote!(&[#(#disks),*]));
    quote!(::vmlab::testing::Settings { #(#fields),* })
}

/// A kernel's name as an identifier that is not yet taken: `debian:6.12` is `debian_6_12`.
fn identifier(kernel: &Text, taken: &[String]) -> Ident {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    let mut name: String = kernel.value.chars().map(plain).collect();
    name = name.split('_').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("_");
    if syn::parse_str::<Ident>(&name).is_err() {
        name = format!("kernel_{name}");
    }
    let mut unique = name.clone();
    let mut number = 1;
    while taken.contains(&unique) {
        number += 1;
        unique = format!("{name}_{number}");
    }
    Ident::new(&unique, kernel.span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_names_as_identifiers() {
        let name = |value: &str, taken: &[String]| {
            let text = Text { value: value.to_owned(), span: Span::call_site() };
            identifier(&text, taken).to_string()
        };
        assert_eq!(name("debian:6.12", &[]), "debian_6_12");
        assert_eq!(name("../arch/x86/boot/bzImage", &[]), "arch_x86_boot_bzImage");
        assert_eq!(name("6.12.1-amd64", &[]), "kernel_6_12_1_amd64");
        assert_eq!(name("type", &[]), "kernel_type");
        assert_eq!(name("debian-6.12", &["debian_6_12".to_owned()]), "debian_6_12_2");
    }
}
