//! Boots a kernel without any device, and shows what it says:
//! `boot KERNEL [INITRD [ARGUMENTS...]]`.
#![allow(clippy::print_stderr, reason = "it is a program")]

#[cfg(target_arch = "x86_64")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use vmlab_vmm::memory::Backing;
    use vmlab_vmm::topology::Topology;
    use vmlab_vmm::x86_64::boot::Kernel;
    use vmlab_vmm::x86_64::{Config, Machine};

    let mut arguments = std::env::args().skip(1);
    let image = File::open(arguments.next().ok_or("usage: boot KERNEL [INITRD [ARGUMENTS...]]")?)?;
    let initrd = arguments.next().map(File::open).transpose()?;
    let rest: Vec<String> = arguments.collect();
    let command_line = format!("console=ttyS0 panic=-1 {}", rest.join(" "));
    let (mut console, line) = UnixStream::pair()?;
    let config = Config {
        memory: 512 << 20,
        backing: Backing::Anonymous,
        topology: Topology { nodes: 1, llcs: 1, cores: 1, threads: 1 },
        slots: 0,
        lines: vec![line],
        generation: [0; 16],
        sandbox: true,
    };
    let started = std::time::Instant::now();
    let machine = Machine::boot(config, Kernel { image, initrd, command_line }, Vec::new())?;
    eprintln!("set up in {:?}", started.elapsed());
    machine.resume()?;
    let shown = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            eprint!("{}", String::from_utf8_lossy(&buffer[..count]));
        }
    });
    let end = machine.wait(Some(started + std::time::Duration::from_secs(60)));
    eprintln!("ended after {:?}: {end:?}, exits {:?}", started.elapsed(), machine.exits());
    drop(machine);
    let _ = shown.join();
    Ok(())
}

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    eprintln!("only x86_64 is there yet");
}
