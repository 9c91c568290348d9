//! What a guest's driver may write to a ring, and what a device sees of it.
#![allow(clippy::unwrap_used, reason = "clippy takes the helpers of tests for other code")]

use vm_memory::{Bytes, GuestAddress};
use vmlab_devices::rng::{MAX_REQUEST, Rng};
use vmlab_devices::{ChainError, MAX_GATHERED};

#[path = "common/driver.rs"]
#[allow(dead_code, reason = "not every test uses all of it")]
mod driver;

use driver::{BUFFERS, Driver, INDIRECT, MEMORY, NEXT, SIZE, TABLE, USED, WRITE};

/// Lets the random number generator serve what is there.
fn serve(driver: &Driver) -> Result<(), vmlab_devices::QueueError> {
    driver::process(&Rng::new(), 0, &driver.queue)
}

/// Offers descriptor 0 and says why it was refused. The queue still works after that.
fn refused(driver: &Driver) -> ChainError {
    driver.offer(0);
    serve(driver).unwrap();
    assert_eq!(driver.used(), [(0, 0)], "a malformed chain is given back with nothing in it");
    let (count, error) = driver.queue.malformed();
    assert_eq!(count, 1);
    driver.describe(7, (BUFFERS, 16, WRITE, 0));
    driver.offer(7);
    serve(driver).unwrap();
    assert_eq!(driver.used()[1], (7, 16));
    error.unwrap()
}

#[test]
fn random_bytes_fill_every_buffer() {
    let driver = Driver::new();
    driver.describe(3, (BUFFERS, 1000, WRITE | NEXT, 1));
    driver.describe(1, (BUFFERS + 4096, 24, WRITE, 0));
    driver.offer(3);
    serve(&driver).unwrap();
    assert_eq!(driver.used(), [(3, 1024)]);
    assert_eq!(driver.interrupts(), 1);
    let bytes = driver.bytes(BUFFERS, 1000);
    // Of 1,000 random bytes, 62 are alike at the most; that more than 100 are zero never happens.
    assert!(bytes.iter().filter(|byte| **byte == 0).count() < 100);
    assert_eq!(driver.bytes(BUFFERS + 1000, 8), [0; 8], "nothing is written behind a buffer");
    assert_ne!(driver.bytes(BUFFERS + 4096, 24), [0; 24]);
    assert_eq!(driver.bytes(BUFFERS + 4096 + 24, 8), [0; 8]);
}

#[test]
fn a_request_for_more_than_the_limit_gets_the_limit() {
    let driver = Driver::new();
    driver.describe(0, (BUFFERS, MAX_REQUEST as u32 + 1, WRITE, 0));
    driver.offer(0);
    serve(&driver).unwrap();
    assert_eq!(driver.used(), [(0, MAX_REQUEST as u32)]);
}

#[test]
fn an_indirect_table_is_followed() {
    let driver = Driver::new();
    let table = BUFFERS + 0x8000;
    driver.describe(2, (table, 32, INDIRECT, 0));
    driver.describe_at(table, 0, (BUFFERS, 8, WRITE | NEXT, 1));
    driver.describe_at(table, 1, (BUFFERS + 64, 8, WRITE, 0));
    driver.offer(2);
    serve(&driver).unwrap();
    assert_eq!(driver.used(), [(2, 16)]);
    assert_ne!(driver.bytes(BUFFERS + 64, 8), [0; 8]);
}

#[test]
fn a_chain_that_loops_is_refused() {
    let driver = Driver::new();
    driver.describe(0, (BUFFERS, 8, WRITE | NEXT, 1));
    driver.describe(1, (BUFFERS, 8, WRITE | NEXT, 0));
    assert_eq!(refused(&driver), ChainError::Endless);
}

#[test]
fn an_indirect_table_that_loops_or_nests_is_refused() {
    let driver = Driver::new();
    let table = BUFFERS + 0x8000;
    driver.describe(0, (table, 32, INDIRECT, 0));
    driver.describe_at(table, 0, (BUFFERS, 8, WRITE | NEXT, 1));
    driver.describe_at(table, 1, (BUFFERS, 8, WRITE | NEXT, 0));
    assert_eq!(refused(&driver), ChainError::Endless);

    let driver = Driver::new();
    driver.describe(0, (table, 16, INDIRECT, 0));
    driver.describe_at(table, 0, (table, 16, INDIRECT, 0));
    assert_eq!(refused(&driver), ChainError::Endless);
}

#[test]
fn a_chain_has_no_more_descriptors_than_the_ring() {
    for (count, error) in [(SIZE, None), (SIZE + 1, Some(ChainError::Endless))] {
        let driver = Driver::new();
        let table = BUFFERS + 0x8000;
        driver.describe(0, (table, u32::from(count) * 16, INDIRECT, 0));
        for index in 0..count {
            let next = if index + 1 < count { NEXT } else { 0 };
            driver.describe_at(table, index, (BUFFERS, 8, WRITE | next, index + 1));
        }
        driver.offer(0);
        serve(&driver).unwrap();
        assert_eq!(driver.queue.malformed().1, error);
        assert_eq!(driver.used(), [(0, if error.is_none() { 8 * u32::from(SIZE) } else { 0 })]);
    }
}

#[test]
fn an_indirect_table_outside_of_memory_is_refused() {
    let driver = Driver::new();
    driver.describe(0, (MEMORY - 8, 16, INDIRECT, 0));
    assert_eq!(refused(&driver), ChainError::Endless);
}

#[test]
fn a_chain_that_leads_out_of_its_table_is_refused() {
    let driver = Driver::new();
    driver.describe(0, (BUFFERS, 8, WRITE | NEXT, SIZE));
    assert_eq!(refused(&driver), ChainError::Endless);
}

#[test]
fn a_buffer_must_be_in_memory_to_its_last_byte() {
    for (address, len) in [(MEMORY, 1), (MEMORY - 63, 64), (u64::MAX - 7, 8), (u64::MAX, 64)] {
        let driver = Driver::new();
        driver.describe(0, (address, len, WRITE, 0));
        assert_eq!(refused(&driver), ChainError::Outside, "{address:x} {len}");
    }
    let driver = Driver::new();
    driver.describe(0, (MEMORY - 64, 64, WRITE, 0));
    driver.offer(0);
    serve(&driver).unwrap();
    assert_eq!(driver.used(), [(0, 64)], "the last byte of memory is one that can be used");
}

#[test]
fn nothing_is_written_where_a_later_buffer_is_bad() {
    let driver = Driver::new();
    driver.describe(0, (BUFFERS, 64, WRITE | NEXT, 1));
    driver.describe(1, (MEMORY - 1, 2, WRITE, 0));
    driver.memory.write_slice(&[7; 64], GuestAddress(BUFFERS + 512)).unwrap();
    driver.offer(0);
    serve(&driver).unwrap();
    assert_eq!(driver.queue.malformed(), (1, Some(ChainError::Outside)));
    assert_eq!(driver.bytes(BUFFERS, 64), [0; 64]);
}

#[test]
fn what_is_read_comes_before_what_is_written() {
    let driver = Driver::new();
    driver.describe(0, (BUFFERS, 8, WRITE | NEXT, 1));
    driver.describe(1, (BUFFERS, 8, 0, 0));
    assert_eq!(refused(&driver), ChainError::Order);
}

#[test]
fn empty_buffers_are_refused() {
    let driver = Driver::new();
    driver.describe(0, (BUFFERS, 0, WRITE, 0));
    assert_eq!(refused(&driver), ChainError::Empty);
}

#[test]
fn a_chain_has_a_longest_length() {
    let driver = Driver::new();
    let half = (MAX_GATHERED / 2) as u32;
    driver.describe(0, (BUFFERS, half, NEXT, 1));
    driver.describe(1, (BUFFERS, half + 1, WRITE, 0));
    assert_eq!(refused(&driver), ChainError::TooLong);

    let driver = Driver::new();
    driver.describe(0, (BUFFERS, half, NEXT, 1));
    driver.describe(1, (BUFFERS, half, WRITE, 0));
    driver.offer(0);
    serve(&driver).unwrap();
    assert_eq!(driver.queue.malformed().0, 0);

    // Whatever else is wrong is seen as well.
    for (second, error) in [
        ((BUFFERS, MEMORY as u32, WRITE, 0), ChainError::Outside),
        ((MEMORY - 1, 2, WRITE, 0), ChainError::Outside),
        ((BUFFERS, 1, 0, 0), ChainError::Order),
        ((BUFFERS, 0, WRITE, 0), ChainError::Empty),
        ((BUFFERS, 1, WRITE | NEXT, 0), ChainError::Endless),
        ((BUFFERS, 1, WRITE, 0), ChainError::TooLong),
    ] {
        let driver = Driver::new();
        driver.describe(0, (BUFFERS, MAX_GATHERED as u32 + 1, WRITE | NEXT, 1));
        driver.describe(1, second);
        assert_eq!(refused(&driver), error, "{second:?}");
    }
}

#[test]
fn an_available_index_that_jumps_breaks_the_queue() {
    let driver = Driver::new();
    driver.set(driver::AVAILABLE + 2, SIZE + 1);
    assert!(serve(&driver).is_err());
}

#[test]
fn a_head_outside_of_the_table_breaks_the_queue() {
    let driver = Driver::new();
    driver.describe(0, (TABLE, 8, WRITE, 0));
    driver.offer(SIZE);
    assert!(serve(&driver).is_err());
}

#[test]
fn an_event_index_holds_interrupts_back() {
    let driver = Driver::new();
    {
        use virtio_queue::QueueT;
        driver.queue.ring().set_event_idx(true);
    }
    driver.describe(0, (BUFFERS, 8, WRITE, 0));
    // The guest wants to be interrupted when the third request is done.
    let used_event = driver::AVAILABLE + 4 + 2 * u64::from(SIZE);
    driver.set(used_event, 2);
    for (done, interrupts) in [(1, 0), (2, 0), (3, 1), (4, 1)] {
        driver.offer(0);
        serve(&driver).unwrap();
        assert_eq!(driver.number(USED + 2), done);
        assert_eq!(driver.interrupts(), interrupts, "after {done}");
    }
}
