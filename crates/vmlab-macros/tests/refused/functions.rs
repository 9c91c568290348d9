use vmlab_macros::test as vm_test;

struct Ctx;
struct Vm;
struct VmBuilder;

#[vm_test(host)]
fn without_a_vm() {}

#[vm_test(host)]
fn a_ctx_of_the_host(ctx: &Ctx) {}

#[vm_test]
fn a_vm_of_the_guest(vm: &mut Vm) {}

#[vm_test]
fn two_arguments(ctx: &Ctx, more: &Ctx) {}

#[vm_test(host)]
fn a_recorder_of_its_own(vm: &mut Vm, recorder: Recorder) {}

#[vm_test(host)]
fn three_arguments(vm: &mut Vm, recorder: &Recorder, more: &Ctx) {}

#[vm_test(host, fail_on = "oops")]
fn events_of_any_vm(builder: VmBuilder) {}

#[vm_test(host, timeout = "60s")]
fn an_end_from_outside(vm: &mut Vm) {}

#[vm_test]
#[test]
fn a_test_twice() {}

#[vm_test]
#[should_panic]
fn returns() -> Result<(), String> {
    Ok(())
}

#[vm_test(expect_err)]
#[should_panic]
fn turned_twice() {}

#[vm_test]
fn generic<T>() {}

fn main() {}
