use vmlab_macros::test as vm_test;

#[vm_test(memory = "lots")]
fn no_size() {}

#[vm_test(timeout = "soon")]
fn no_time() {}

#[vm_test(topology = "1,2")]
fn no_topology() {}

#[vm_test(cpus = 0)]
fn no_cpus() {}

#[vm_test(kernel = 6.12)]
fn no_kernel() {}

#[vm_test(kernel = [])]
fn no_kernels() {}

#[vm_test(net = "bridge")]
fn no_network() {}

#[vm_test(disk(name = "a,b"))]
fn no_option() {}

#[vm_test(host = "yes")]
fn no_flag() {}

fn main() {}
