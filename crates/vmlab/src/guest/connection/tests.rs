use super::*;
use std::time::Duration;
use vmlab_wire::flow::STREAM_WINDOW;
use vmlab_wire::message::{ExitStatus, StartStage, decode};
use vmlab_wire::{Frame, GuestMessage};

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(10);

/// The agent's side, played by the test.
struct Peer {
    socket: UnixStream,
    decoder: Decoder,
}

#[derive(Debug, PartialEq)]
enum Got {
    Message(HostMessage),
    Data(StreamId, Vec<u8>),
    Eof(StreamId),
    Credit(StreamId, u32),
    Stop(StreamId),
}

impl Peer {
    fn new() -> (Arc<Connection>, Peer) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        (Connection::open(ours).unwrap(), Peer { socket: theirs, decoder: Decoder::new() })
    }

    fn greeted() -> (Arc<Connection>, Peer) {
        let (connection, mut peer) = Self::new();
        peer.socket.write_all(&Preamble::OURS.encode()).unwrap();
        let mut preamble = [0; Preamble::LEN];
        peer.socket.read_exact(&mut preamble).unwrap();
        Preamble::check(preamble).unwrap();
        (connection, peer)
    }

    /// The other end of a connection that goes on where one was held, and was told so.
    fn going_on(held: &Held) -> (Arc<Connection>, Peer) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(PATIENCE)).unwrap();
        let first = HostMessage::AdjustClock(5);
        let connection = Connection::go_on(ours, held, &first).unwrap();
        let mut peer = Peer { socket: theirs, decoder: Decoder::new() };
        assert_eq!(peer.next(), Got::Message(first));
        (connection, peer)
    }

    fn send(&mut self, message: &GuestMessage) {
        let mut bytes = Vec::new();
        encode(message, &mut bytes).unwrap();
        self.socket.write_all(&bytes).unwrap();
    }

    fn data(&mut self, stream: StreamId, data: &[u8]) {
        let mut bytes = Vec::new();
        put_data(&mut bytes, stream, data);
        self.socket.write_all(&bytes).unwrap();
    }

    fn empty(&mut self, stream: StreamId, kind: FrameKind) {
        let mut bytes = Vec::new();
        put_empty(&mut bytes, stream, kind);
        self.socket.write_all(&bytes).unwrap();
    }

    fn next(&mut self) -> Got {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return match frame {
                    Frame::Message(bytes) => Got::Message(decode(bytes).unwrap()),
                    Frame::Data(stream, bytes) => Got::Data(stream, bytes.to_vec()),
                    Frame::Eof(stream) => Got::Eof(stream),
                    Frame::Credit(stream, bytes) => Got::Credit(stream, bytes),
                    Frame::Stop(stream) => Got::Stop(stream),
                };
            }
            let mut bytes = [0; 65536];
            let count = self.socket.read(&mut bytes).unwrap();
            assert!(count > 0, "the connection was closed");
            self.decoder.push(&bytes[..count]);
        }
    }
}

fn exited(code: u8) -> Exited {
    Exited { status: ExitStatus::Code(code), oom_kills: 0, cpu_us: (0, 0) }
}

/// A stream whose reader is gone and which the guest has ended leaves nothing behind.
fn assert_forgotten(connection: &Connection, stream: StreamId) {
    let gone = |state: &mut State| (!state.outputs.contains_key(&stream)).then_some(());
    assert_eq!(connection.wait_for(soon(), gone), Ok(Some(())));
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + PATIENCE)
}

#[test]
fn nothing_is_sent_before_the_guest_greets() {
    let (connection, mut peer) = Peer::new();
    connection.send(&HostMessage::PowerOff).unwrap();
    peer.socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(peer.socket.read(&mut [0]).is_err());
    peer.socket.set_read_timeout(Some(PATIENCE)).unwrap();
    peer.socket.write_all(&Preamble::OURS.encode()).unwrap();
    let mut preamble = [0; Preamble::LEN];
    peer.socket.read_exact(&mut preamble).unwrap();
    assert_eq!(preamble, Preamble::OURS.encode());
    assert_eq!(peer.next(), Got::Message(HostMessage::PowerOff));
}

#[test]
fn a_stranger_is_refused() {
    let (connection, mut peer) = Peer::new();
    peer.socket.write_all(b"login: password: ").unwrap();
    let lost = connection.wait_ready(soon()).unwrap_err();
    assert!(matches!(lost, Lost::Protocol(what) if what.contains("does not speak")));
}

#[test]
fn output_ends_with_the_command_even_if_its_children_hold_it() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    let stdout = process.stream(Stdio::Stdout);
    peer.send(&GuestMessage::Started(process));
    assert_eq!(connection.wait_started(process), Ok(Ok(())));
    peer.data(stdout, b"before");
    peer.send(&GuestMessage::Exited(process, exited(3)));
    peer.data(stdout, b"after");
    assert_eq!(peer.next(), Got::Stop(stdout));
    peer.empty(stdout, FrameKind::Eof);
    assert_eq!(connection.read_output(stdout), Ok(Some(b"before".to_vec())));
    assert_eq!(connection.read_output(stdout), Ok(None));
    assert_eq!(connection.wait_exited(process, soon()), Ok(Some(exited(3))));
    connection.stop_output(stdout);
    assert_forgotten(&connection, stdout);
}

#[test]
fn a_dropped_reader_stops_the_command() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    let stdout = process.stream(Stdio::Stdout);
    peer.data(stdout, b"x");
    connection.stop_output(stdout);
    assert_eq!(peer.next(), Got::Stop(stdout));
    peer.data(stdout, b"late");
    peer.empty(stdout, FrameKind::Eof);
    peer.send(&GuestMessage::Exited(process, exited(0)));
    assert_eq!(connection.wait_exited(process, soon()), Ok(Some(exited(0))));
    assert_forgotten(&connection, stdout);
}

#[test]
fn credit_is_granted_as_output_is_consumed() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    let stdout = process.stream(Stdio::Stdout);
    let half = STREAM_WINDOW as usize / 2;
    peer.data(stdout, &vec![1; half]);
    let mut taken = 0;
    while taken < half {
        let chunk = connection.read_output(stdout).unwrap().unwrap();
        taken += chunk.len();
        connection.consumed(stdout, chunk.len());
    }
    let mut granted = 0;
    while granted < half / 2 {
        let Got::Credit(stream, bytes) = peer.next() else { panic!("no credit") };
        assert_eq!(stream, stdout);
        granted += bytes as usize;
    }
}

#[test]
fn a_guest_that_sends_beyond_its_credit_is_cut_off() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    let data = vec![0; STREAM_WINDOW as usize + 1];
    let mut bytes = Vec::new();
    put_data(&mut bytes, process.stream(Stdio::Stdout), &data);
    // The connection may be cut before all is written.
    let _ = peer.socket.write_all(&bytes);
    let lost = connection.wait_exited(process, soon()).unwrap_err();
    assert!(matches!(lost, Lost::Protocol(what) if what.contains("credit")));
}

#[test]
fn news_of_strangers_is_an_error() {
    for news in [GuestMessage::Exited(ProcessId(0), exited(0)), GuestMessage::Started(ProcessId(7))]
    {
        let (connection, mut peer) = Peer::greeted();
        peer.send(&news);
        assert!(matches!(connection.wait_ready(soon()), Err(Lost::Protocol(_))));
    }
    let (connection, mut peer) = Peer::greeted();
    peer.data(StreamId(2), b"x");
    assert!(matches!(connection.wait_ready(soon()), Err(Lost::Protocol(_))));
    let (connection, mut peer) = Peer::greeted();
    peer.empty(StreamId(2), FrameKind::Eof);
    assert!(matches!(connection.wait_ready(soon()), Err(Lost::Protocol(_))));
}

#[test]
fn a_stream_that_ends_twice_does_no_harm() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    let stdout = process.stream(Stdio::Stdout);
    peer.empty(stdout, FrameKind::Eof);
    assert_eq!(connection.read_output(stdout), Ok(None));
    connection.stop_output(stdout);
    assert_forgotten(&connection, stdout);
    peer.empty(stdout, FrameKind::Eof);
    peer.send(&GuestMessage::Exited(process, exited(0)));
    assert_eq!(connection.wait_exited(process, soon()), Ok(Some(exited(0))));
}

#[test]
fn a_forgotten_command_stays_forgotten() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[]);
    connection.forget(process);
    peer.send(&GuestMessage::Exited(process, exited(0)));
    peer.send(&GuestMessage::PoweringOff);
    assert_eq!(connection.wait_powering_off(soon()), Ok(Some(())));
    assert!(connection.lock().processes.is_empty());
}

#[test]
fn input_waits_for_credit_and_ends_when_stopped() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(true, &[]);
    let stdin = process.stream(Stdio::Stdin);
    let all = vec![5; STREAM_WINDOW as usize];
    let mut sent = 0;
    while sent < all.len() {
        sent += connection.write_input(stdin, &all[sent..]).unwrap();
    }
    let mut received = 0;
    while received < all.len() {
        let Got::Data(_, bytes) = peer.next() else { panic!("no data") };
        received += bytes.len();
    }
    let writer = Arc::clone(&connection);
    let blocked = std::thread::spawn(move || writer.write_input(stdin, b"more"));
    let mut credit = Vec::new();
    put_credit(&mut credit, stdin, 2);
    peer.socket.write_all(&credit).unwrap();
    assert_eq!(blocked.join().unwrap().unwrap(), 2);
    assert_eq!(peer.next(), Got::Data(stdin, b"mo".to_vec()));

    let waiter = Arc::clone(&connection);
    let wanted = std::thread::spawn(move || waiter.input_wanted(stdin));
    peer.empty(stdin, FrameKind::Stop);
    assert!(!wanted.join().unwrap());
    let error = connection.write_input(stdin, b"x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn a_command_that_has_ended_wants_no_input() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(true, &[]);
    peer.send(&GuestMessage::Exited(process, exited(0)));
    assert_eq!(connection.wait_exited(process, soon()), Ok(Some(exited(0))));
    assert!(!connection.input_wanted(process.stream(Stdio::Stdin)));
}

#[test]
fn the_end_of_input_is_told_once() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(true, &[]);
    let stdin = process.stream(Stdio::Stdin);
    connection.write_input(stdin, b"x").unwrap();
    connection.end_input(stdin);
    connection.end_input(stdin);
    connection.send(&HostMessage::PowerOff).unwrap();
    assert_eq!(peer.next(), Got::Data(stdin, b"x".to_vec()));
    assert_eq!(peer.next(), Got::Eof(stdin));
    assert_eq!(peer.next(), Got::Message(HostMessage::PowerOff));
}

#[test]
fn a_lost_connection_wakes_everybody_and_keeps_what_came() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(true, &[Stdio::Stdout]);
    let stdout = process.stream(Stdio::Stdout);
    let waiter = Arc::clone(&connection);
    let exit = std::thread::spawn(move || waiter.wait_exited(process, None));
    peer.data(stdout, b"last words");
    drop(peer);
    assert_eq!(exit.join().unwrap(), Err(Lost::Closed));
    assert_eq!(connection.read_output(stdout), Ok(Some(b"last words".to_vec())));
    assert_eq!(connection.read_output(stdout), Err(Lost::Closed));
    assert!(!connection.input_wanted(process.stream(Stdio::Stdin)));
}

#[test]
fn a_command_that_cannot_start_says_why() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    let failure = StartFailure { stage: StartStage::Program, errno: 2 };
    peer.send(&GuestMessage::StartFailed(process, failure.clone()));
    assert_eq!(connection.wait_started(process), Ok(Err(failure)));
    assert!(connection.lock().outputs.is_empty());
}

#[test]
fn a_deadline_is_kept() {
    let (connection, _peer) = Peer::greeted();
    let soon = Some(Instant::now() + Duration::from_millis(20));
    assert_eq!(connection.wait_ready(soon), Ok(None));
}

#[test]
fn a_connection_that_is_held_goes_on_elsewhere_as_it_was() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    connection.send(&HostMessage::Signal(process, 1)).unwrap();
    connection.ask(&HostMessage::Hold(vec![1])).unwrap();
    // What comes after that waits.
    connection.send(&HostMessage::Signal(process, 2)).unwrap();
    assert_eq!(peer.next(), Got::Message(HostMessage::Signal(process, 1)));
    assert_eq!(peer.next(), Got::Message(HostMessage::Hold(vec![1])));
    peer.send(&GuestMessage::Done(Ok(())));
    assert_eq!(connection.wait_done(soon()), Ok(Some(Ok(()))));
    let held = connection.held();
    connection.close();

    // More than once, and each time with what waited.
    for _ in 0..2 {
        let (connection, mut peer) = Peer::going_on(&held);
        assert_eq!(peer.next(), Got::Message(HostMessage::Signal(process, 2)));
        // The guest's commands are known, and none waits for a reader of the other connection.
        assert_eq!(peer.next(), Got::Stop(process.stream(Stdio::Stdout)));
        peer.data(process.stream(Stdio::Stdout), b"said before it heard that");
        peer.send(&GuestMessage::Exited(process, exited(0)));
        assert_eq!(connection.wait_exited(process, soon()), Ok(Some(exited(0))));
        assert_eq!(connection.new_process(false, &[]), ProcessId(process.0 + 1));
    }
}

#[test]
fn an_agent_that_does_not_hold_hears_what_waited() {
    let (connection, mut peer) = Peer::greeted();
    connection.ask(&HostMessage::Hold(vec![])).unwrap();
    connection.send(&HostMessage::BootLog).unwrap();
    assert_eq!(peer.next(), Got::Message(HostMessage::Hold(vec![])));
    connection.open_gate();
    assert_eq!(peer.next(), Got::Message(HostMessage::BootLog));
}

#[test]
fn streams_whose_readers_stayed_behind_are_stopped() {
    let (connection, mut peer) = Peer::greeted();
    let process = connection.new_process(false, &[Stdio::Stdout]);
    connection.ask(&HostMessage::Hold(vec![])).unwrap();
    assert_eq!(peer.next(), Got::Message(HostMessage::Hold(vec![])));
    let held = connection.held();
    let (connection, mut peer) = Peer::going_on(&held);
    assert_eq!(peer.next(), Got::Stop(process.stream(Stdio::Stdout)));
    peer.empty(process.stream(Stdio::Stdout), FrameKind::Eof);
    assert_forgotten(&connection, process.stream(Stdio::Stdout));
}

#[test]
fn a_guest_is_nudged_unless_it_holds() {
    const OFTEN: Duration = Duration::from_millis(5);
    let (connection, mut peer) = Peer::greeted();
    connection.nudge_every(OFTEN);
    for _ in 0..3 {
        assert_eq!(peer.next(), Got::Message(HostMessage::Nudge));
    }
    connection.ask(&HostMessage::Hold(vec![])).unwrap();
    let after_nudges = |peer: &mut Peer| loop {
        let got = peer.next();
        if got != Got::Message(HostMessage::Nudge) {
            break got;
        }
    };
    assert_eq!(after_nudges(&mut peer), Got::Message(HostMessage::Hold(vec![])));
    peer.socket.set_read_timeout(Some(20 * OFTEN)).unwrap();
    assert!(peer.socket.read(&mut [0]).is_err(), "something was said to a guest that holds");
    peer.send(&GuestMessage::Done(Ok(())));
    assert_eq!(connection.wait_done(soon()), Ok(Some(Ok(()))));

    let (_connection, mut peer) = Peer::going_on(&connection.held());
    assert_eq!(peer.next(), Got::Message(HostMessage::Nudge));
}
