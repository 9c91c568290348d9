use vmlab_macros::test as vm_test;

#[vm_test(kernal = "debian:6.12")]
fn slips() {}

#[vm_test(memory = "512M", memory = "1G")]
fn twice() {}

#[vm_test(cpus = 2, topology = "1,1,2,1")]
fn two_ways_to_have_cpus() {}

#[vm_test(image = "debian:12", rootfs = "/srv/root")]
fn two_roots() {}

#[vm_test(colour = "red")]
fn nothing_near() {}

#[vm_test(kernel = ["debian:6.1", "debian:6.12", "debian:6.1"])]
fn one_kernel_twice() {}

#[vm_test(share(guest = "/mnt"))]
fn no_host() {}

#[vm_test(share(host = "/srv", writeable))]
fn slips_of_shares() {}

#[vm_test(disk(name = "a", size = "1G"), disk(name = "a", size = "2G"))]
fn one_disk_twice() {}

fn main() {}
