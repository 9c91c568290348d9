//! What driver and device tell each other of ports: virtio 1.2, 5.3.6.2. It knows no queues.

use serde::{Deserialize, Serialize};

/// The bytes of `struct virtio_console_control`.
pub(super) const HEADER: usize = 8;

/// The events: `VIRTIO_CONSOLE_*` of `linux/virtio_console.h`.
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What the driver is to be told of a port, in this order. It is told once however often it asks before that, so
/// that what waits for its buffers needs no limit.
mod news {
    pub(super) const ADDED: u8 = 1;
    pub(super) const CONSOLE: u8 = 1 << 1;
    pub(super) const NAME: u8 = 1 << 2;
    pub(super) const OPEN: u8 = 1 << 3;
    pub(super) const SIZE: u8 = 1 << 4;
    pub(super) const ALL: u8 = ADDED | CONSOLE | NAME | OPEN | SIZE;
}

/// What of a port never changes.
#[derive(Debug, Clone)]
pub(super) struct Kind {
    pub(super) name: Option<String>,
    pub(super) console: bool,
}

/// Where driver and device are.
#[derive(Debug)]
pub(super) struct Control {
    kinds: Vec<Kind>,
    /// Whether the host may still send.
    host_open: Vec<bool>,
    /// Columns and rows, if the host has said.
    size: Option<(u16, u16)>,
    state: State,
}

/// What a snapshot keeps of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Whether the driver takes part. One that knows a single port does not.
    talks: bool,
    ports: Vec<PortState>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PortState {
    ready: bool,
    open: bool,
    /// Whether the driver takes the host's end for open.
    told_open: bool,
    news: u8,
}

impl State {
    fn new(ports: usize) -> Self {
        Self { talks: false, ports: vec![PortState::default(); ports] }
    }

    /// Whether it can be that of a device with so many ports.
    pub(super) fn fits(&self, ports: usize) -> bool {
        self.ports.len() == ports && self.ports.iter().all(|port| port.news & !news::ALL == 0)
    }
}

impl Control {
    pub(super) fn new(kinds: Vec<Kind>, host_open: Vec<bool>) -> Self {
        let state = State::new(kinds.len());
        Self { kinds, host_open, size: None, state }
    }

    /// As before the driver has said anything.
    pub(super) fn reset(&mut self) {
        self.state = State::new(self.kinds.len());
    }

    pub(super) fn state(&self) -> &State {
        &self.state
    }

    /// Goes on with a state that fits. The driver is told what is different here.
    pub(super) fn restore(&mut self, state: State) {
        self.state = state;
        for (port, host_open) in self.state.ports.iter_mut().zip(&self.host_open) {
            if port.ready && port.told_open != *host_open {
                port.news |= news::OPEN;
            }
        }
        self.resized();
    }

    /// Whether a port takes bytes of the host, and the host sends some.
    pub(super) fn flows(&self, port: usize) -> bool {
        let opened = self.state.ports[port].open || port == 0 && !self.state.talks;
        self.host_open[port] && opened
    }

    /// Whether there is something to tell.
    pub(super) fn has_news(&self) -> bool {
        self.state.ports.iter().any(|port| port.news != 0)
    }

    /// Takes note that the host will send no more.
    pub(super) fn host_closed(&mut self, port: usize) {
        self.host_open[port] = false;
        let state = &mut self.state.ports[port];
        if state.ready {
            state.news |= news::OPEN;
        }
    }

    pub(super) fn size(&self) -> Option<(u16, u16)> {
        self.size
    }

    pub(super) fn resize(&mut self, columns: u16, rows: u16) {
        self.size = Some((columns, rows));
        self.resized();
    }

    fn resized(&mut self) {
        for (port, kind) in self.state.ports.iter_mut().zip(&self.kinds) {
            if port.ready && kind.console && self.size.is_some() {
                port.news |= news::SIZE;
            }
        }
    }

    /// Takes what the driver says. Whatever makes no sense is left alone.
    pub(super) fn hear(&mut self, message: [u8; HEADER]) {
        let [a, b, c, d, e, f, g, h] = message;
        let port = u32::from_le_bytes([a, b, c, d]);
        let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        if (event, value) == (DEVICE_READY, 1) {
            self.state.talks = true;
            for port in &mut self.state.ports {
                port.news |= news::ADDED;
            }
            return;
        }
        let Ok(index) = usize::try_from(port) else { return };
        let Some(port) = self.state.ports.get_mut(index) else { return };
        match (event, value) {
            (PORT_READY, 1) => {
                let kind = &self.kinds[index];
                port.ready = true;
                let tell = [
                    (news::CONSOLE, kind.console),
                    (news::NAME, kind.name.is_some()),
                    (news::OPEN, self.host_open[index] || port.told_open),
                    (news::SIZE, kind.console && self.size.is_some()),
                ];
                for (what, whether) in tell {
                    port.news |= if whether { what } else { 0 };
                }
            }
            (PORT_OPEN, value) => port.open = value != 0,
            _ => {}
        }
    }

    /// The next message for the driver.
    pub(super) fn tell(&mut self) -> Option<Vec<u8>> {
        let index = self.state.ports.iter().position(|port| port.news != 0)?;
        let port = &mut self.state.ports[index];
        // The lowest bit that is set.
        let what = port.news & port.news.wrapping_neg();
        port.news &= !what;
        let message = |event: u16, value: u16, rest: &[u8]| {
            let id = (index as u32).to_le_bytes();
            [&id[..], &event.to_le_bytes(), &value.to_le_bytes(), rest].concat()
        };
        let kind = &self.kinds[index];
        Some(match what {
            news::ADDED => message(PORT_ADD, 1, &[]),
            news::CONSOLE => message(CONSOLE_PORT, 1, &[]),
            news::NAME => message(PORT_NAME, 1, kind.name.as_deref().unwrap_or("").as_bytes()),
            news::OPEN => {
                port.told_open = self.host_open[index];
                message(PORT_OPEN, port.told_open.into(), &[])
            }
            // As the specification has it. Linux had these two the other way round until commit 5326ab737a47,
            // which was taken up by its stable series in January of 2026.
            _ => {
                let (columns, rows) = self.size.unwrap_or_default();
                message(RESIZE, 1, &[columns.to_le_bytes(), rows.to_le_bytes()].concat())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> Control {
        let kind = |name: Option<&str>, console| Kind { name: name.map(str::to_owned), console };
        Control::new(vec![kind(None, true), kind(Some("agent"), false)], vec![false, true])
    }

    fn said(id: u32, event: u16, value: u16) -> [u8; HEADER] {
        let bytes = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        bytes.try_into().expect("8 bytes")
    }

    fn all(control: &mut Control) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| control.tell()).collect()
    }

    #[test]
    fn a_driver_is_told_of_each_port_in_order() {
        let mut control = control();
        assert!(!control.has_news());
        control.hear(said(7, DEVICE_READY, 1));
        control.hear(said(0, DEVICE_READY, 1));
        assert_eq!(all(&mut control), [said(0, PORT_ADD, 1), said(1, PORT_ADD, 1)]);
        control.resize(132, 50);
        for _ in 0..1000 {
            control.hear(said(1, PORT_READY, 1));
            control.hear(said(0, PORT_READY, 1));
        }
        let name = [&said(1, PORT_NAME, 1)[..], b"agent"].concat();
        let size = [&said(0, RESIZE, 1)[..], &[132, 0, 50, 0]].concat();
        let told = [said(0, CONSOLE_PORT, 1).to_vec(), size, name, said(1, PORT_OPEN, 1).to_vec()];
        assert_eq!(all(&mut control), told);
        assert!(!control.has_news());
        control.host_closed(1);
        assert_eq!(all(&mut control), [said(1, PORT_OPEN, 0)]);
    }

    #[test]
    fn only_what_makes_sense_is_heard() {
        let mut control = control();
        let fresh = control.state().clone();
        for (id, event, value) in [
            (0, DEVICE_READY, 0),
            (0, DEVICE_READY, 2),
            (2, PORT_READY, 1),
            (u32::MAX, PORT_OPEN, 1),
            (1, PORT_READY, 0),
            (1, PORT_ADD, 1),
            (1, PORT_NAME, 1),
            (1, RESIZE, 1),
            (1, u16::MAX, 1),
        ] {
            control.hear(said(id, event, value));
        }
        assert_eq!(control.state(), &fresh);
    }

    #[test]
    fn bytes_flow_when_both_ends_are_open() {
        let mut control = control();
        assert!(!control.flows(0), "the host has no end");
        assert!(!control.flows(1));
        control.hear(said(1, PORT_OPEN, 1));
        assert!(control.flows(1));
        control.hear(said(1, PORT_OPEN, 0));
        assert!(!control.flows(1));
        control.hear(said(1, PORT_OPEN, 1));
        control.host_closed(1);
        assert!(!control.flows(1));
        // A driver that knows one port says nothing of it.
        control.host_open[0] = true;
        assert!(control.flows(0));
        control.hear(said(0, DEVICE_READY, 1));
        assert!(!control.flows(0));
    }

    #[test]
    fn another_device_tells_what_is_different() {
        let mut first = control();
        first.hear(said(0, DEVICE_READY, 1));
        first.hear(said(1, PORT_READY, 1));
        first.hear(said(1, PORT_OPEN, 1));
        all(&mut first);
        let mut same = control();
        same.restore(first.state().clone());
        assert_eq!(same.state(), first.state());
        assert!(same.flows(1));
        let mut closed = control();
        closed.host_closed(1);
        closed.restore(first.state().clone());
        assert_eq!(all(&mut closed), [said(1, PORT_OPEN, 0)]);
    }
}
