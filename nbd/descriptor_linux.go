package nbd

import (
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// descriptor is that of a socket, and knows how to wait for it: a busy
// one in ppoll(2), which keeps a thread but wakes no other, and one that has had
// nothing to do for a while in Go's poller, which keeps none.
type descriptor struct {
	reading, writing side

	patience time.Duration // see within; of whoever writes
	manner   atomic.Int32  // of waiting to read, a manner
	spins    bool          // the last wait to read was short enough to spin; of whoever reads
	short    atomic.Int32  // waits in Go's poller in a row that were short
	needed   atomic.Int32  // how many of them make it busy
	fruits   atomic.Int32  // busy waits that ended well since it is busy

	mu     sync.Mutex      // guards what follows
	fd     int             // Go's poller does not know it
	users  int             // calls that use fd
	idle   pollable        // the same socket in Go's poller; nil while it is busy
	raw    syscall.RawConn // of idle
	idlers int             // calls that wait for idle
	closed bool
}

// side is one direction of a socket.
type side struct {
	events   int16
	ready    func(fd uintptr) bool // whether the events have come, or an error
	deadline atomic.Int64          // in nanoseconds of the epoch; 0: none
	until    time.Time             // what patience amounts to, once it has begun; of whoever writes
}

func (d *side) init(events int16) {
	d.events = events
	d.ready = func(fd uintptr) bool {
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: events}}
		n, errno := ppollNow(fds[:], &unix.Timespec{})
		return n != 0 || errno != 0 && errno != syscall.EINTR
	}
}

// pollable is what Go's poller knows.
type pollable interface {
	SyscallConn() (syscall.RawConn, error)
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	Close() error
}

const (
	// busyWait is how long a busy socket may have nothing to do.
	busyWait = 5 * time.Millisecond
	// shortWait is a wait that it would have been better to wait busily.
	shortWait = time.Millisecond
	// shortWaits is how many of these make a socket busy; twice as many the next
	// time if it was not worth it, up to mostShortWaits. Going to and fro costs
	// system calls and memory, and on an overloaded machine, where peers are kept
	// from running for longer than busyWait, it would happen every few requests.
	shortWaits     = 4
	mostShortWaits = 64
	// worthIt is how many busy waits have to end well for being busy to pay.
	worthIt = 32
)

// begin takes a connection over. It is closed by Close, or if begin fails by
// the caller.
func (f *descriptor) begin(nc pollable) error {
	raw, err := nc.SyscallConn()
	if err != nil {
		return err
	}
	f.reading.init(unix.POLLIN)
	f.writing.init(unix.POLLOUT)
	f.idle, f.raw = nc, raw
	f.needed.Store(shortWaits)
	if cerr := raw.Control(func(fd uintptr) { f.fd, err = duplicate(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

func duplicate(fd int) (int, error) {
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

// Close ends all calls that are under way. The descriptor is closed by the last
// of them.
func (f *descriptor) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return net.ErrClosed
	}
	f.closed = true
	if f.idle != nil {
		_ = f.idle.Close() // a second descriptor of what is closed below
	}
	if f.users > 0 {
		_ = unix.Shutdown(f.fd, unix.SHUT_RDWR) // fails if the peer has gone, which does as well
		return nil
	}
	return unix.Close(f.fd)
}

func (f *descriptor) enter() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		f.users++
	}
	return !f.closed
}

func (f *descriptor) leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.users--; f.users == 0 && f.closed {
		_ = unix.Close(f.fd)
	}
}

func (f *descriptor) isClosed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

// SetDeadline implements net.Conn.
func (f *descriptor) SetDeadline(t time.Time) error {
	return errors.Join(f.SetReadDeadline(t), f.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn. A read that waits busily notices a change
// within busyWait.
func (f *descriptor) SetReadDeadline(t time.Time) error {
	return f.setDeadline(&f.reading, t)
}

// SetWriteDeadline implements net.Conn, likewise.
func (f *descriptor) SetWriteDeadline(t time.Time) error {
	return f.setDeadline(&f.writing, t)
}

func (f *descriptor) setDeadline(d *side, t time.Time) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return net.ErrClosed
	}
	var at int64
	if !t.IsZero() {
		at = t.UnixNano()
	}
	d.deadline.Store(at)
	return f.pollUntil(d, t)
}

// pollUntil tells Go's poller of a deadline. f.mu is held.
func (f *descriptor) pollUntil(d *side, t time.Time) error {
	switch {
	case f.idle == nil:
		return nil
	case d == &f.reading:
		return f.idle.SetReadDeadline(t)
	}
	return f.idle.SetWriteDeadline(t)
}

// within has what is sent from now on fail if the peer takes longer for it than
// that; 0 means for ever. The clock is only looked at when somebody waits: few
// replies ever do.
func (f *descriptor) within(patience time.Duration) {
	f.patience = patience
	f.writing.until = time.Time{}
}

// limit is when a wait of that side has to end; zero means never.
func (f *descriptor) limit(d *side, now time.Time) time.Time {
	var t time.Time
	if at := d.deadline.Load(); at != 0 {
		t = time.Unix(0, at)
	}
	if d == &f.writing && f.patience > 0 {
		if d.until.IsZero() {
			d.until = now.Add(f.patience)
		}
		if t.IsZero() || d.until.Before(t) {
			t = d.until
		}
	}
	return t
}

// transfer runs step until it does not fail with EAGAIN, and waits in between.
func (f *descriptor) transfer(d *side, step func(fd int) syscall.Errno) error {
	if !f.enter() {
		return net.ErrClosed
	}
	defer f.leave()
	for {
		// A deadline in the past is an order to end, whatever has arrived.
		if d.deadline.Load() == aLongTimeAgo.UnixNano() {
			return os.ErrDeadlineExceeded
		}
		switch errno := step(f.fd); errno {
		case 0:
			return nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			if err := f.wait(d); err != nil {
				return err
			}
		default:
			if f.isClosed() {
				return net.ErrClosed
			}
			return errno
		}
	}
}

// wait waits until that side is ready, or its time is over.
func (f *descriptor) wait(d *side) error {
	begin := time.Now()
	until := f.limit(d, begin)
	m := patiently
	if d == &f.reading {
		m = manner(f.manner.Load())
	}
	if f.isBusy() && m != calmly {
		if m == eagerly && f.spin(begin) {
			f.fruits.Add(1)
			return nil
		}
		ready, err := f.waitBusily(d, begin, until)
		if err != nil {
			return err
		}
		if ready {
			f.fruits.Add(1)
			return nil
		}
		if until = f.limit(d, begin); !until.IsZero() && !time.Now().Before(until) {
			return os.ErrDeadlineExceeded
		}
	}
	if err := f.waitIdly(d, begin); err != nil {
		return err
	}
	if time.Since(begin) > shortWait {
		f.short.Store(0)
	} else if f.short.Add(1) >= f.needed.Load() && m != calmly {
		f.getBusy()
	}
	return nil
}

func (f *descriptor) isBusy() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.idle == nil
}

// getBusy takes the socket out of Go's poller, unless somebody is waiting there.
func (f *descriptor) getBusy() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.short.Store(0)
	if f.idle != nil && f.idlers == 0 && !f.closed {
		_ = f.idle.Close() // one of two descriptors
		f.idle = nil
		f.fruits.Store(0)
	}
}

// maxSpin is how long a reader may spin: what a peer takes to go on that is on this
// machine or near it, and as much as a processor may be kept from others.
const maxSpin = 100 * time.Microsecond

// spinners is how many readers spin, of all servers of the process: at most one,
// as there may be few processors, and those who work want them too.
var spinners atomic.Int32

// spin looks for bytes again and again, unless the last wait was longer than that
// is worth, and reports whether there are any. A thread that sleeps is woken at
// the expense of the peer, who has to interrupt another processor for that, and
// the two of them together take longer for it than for a short read.
func (f *descriptor) spin(begin time.Time) bool {
	if !f.spins || runtime.GOMAXPROCS(0) < 2 || !spinners.CompareAndSwap(0, 1) {
		return false
	}
	defer spinners.Store(0)
	for {
		if f.reading.ready(uintptr(f.fd)) {
			return true
		}
		if time.Since(begin) >= maxSpin {
			f.spins = false
			return false
		}
		yieldNow()
	}
}

// waitBusily waits up to busyWait and reports whether the side is ready.
func (f *descriptor) waitBusily(d *side, now, until time.Time) (ready bool, err error) {
	timeout := busyWait
	if !until.IsZero() {
		timeout = min(timeout, max(until.Sub(now), 0))
	}
	ts := unix.NsecToTimespec(int64(timeout))
	fds := [1]unix.PollFd{{Fd: int32(f.fd), Events: d.events}}
	n, err := unix.Ppoll(fds[:], &ts, nil)
	switch {
	case f.isClosed():
		return false, net.ErrClosed
	case err == unix.EINTR:
		return true, nil // somebody wants the thread; trying again tells
	}
	if d == &f.reading {
		f.spins = n > 0 && time.Since(now) < maxSpin
	}
	return n > 0, err
}

// waitIdly waits in Go's poller.
func (f *descriptor) waitIdly(d *side, begin time.Time) error {
	raw, err := f.beginIdling(d, begin)
	if err != nil {
		return err
	}
	defer f.endIdling()
	if d == &f.reading {
		err = raw.Read(d.ready)
	} else {
		err = raw.Write(d.ready)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.ErrDeadlineExceeded
	case f.isClosed():
		return net.ErrClosed
	}
	return err
}

// beginIdling puts the socket into Go's poller. The deadline is that of now: who
// changes it while f.mu is not held must not be overruled.
func (f *descriptor) beginIdling(d *side, begin time.Time) (syscall.RawConn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, net.ErrClosed
	}
	if f.idle == nil {
		fd, err := duplicate(f.fd)
		if err != nil {
			return nil, os.NewSyscallError("fcntl", err)
		}
		file := os.NewFile(uintptr(fd), "socket")
		raw, err := file.SyscallConn()
		if err != nil {
			file.Close()
			return nil, err
		}
		f.idle, f.raw = file, raw
		if f.fruits.Load() >= worthIt {
			f.needed.Store(shortWaits)
		} else {
			f.needed.Store(min(2*f.needed.Load(), mostShortWaits))
		}
	}
	if err := f.pollUntil(d, f.limit(d, begin)); err != nil {
		return nil, err
	}
	f.idlers++
	return f.raw, nil
}

func (f *descriptor) endIdling() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.idlers--
}
