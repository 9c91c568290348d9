use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Nothing goes round in circles: what does would use the CPU all of the time, so one window without is enough. There is
/// one once the tests beside this one, whose time is counted too, are over.
pub(crate) fn expect_rest() {
    const WINDOW: Duration = Duration::from_millis(200);
    const WINDOWS: usize = 100;
    let used = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let quiet = (0..WINDOWS).any(|_| {
        let before = used();
        std::thread::sleep(WINDOW);
        // On a busy machine, one that goes round gets only a part of the time.
        used() - before < WINDOW / 20
    });
    assert!(quiet, "a queue is served without rest");
}
