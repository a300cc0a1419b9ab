package xapitest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// DeviceStyle determines the device names of VBD.plug, which depend on the version of the
// storage manager on real hosts.
type DeviceStyle int

const (
	// StyleXVD gives "xvda", "xvdb", … by userdevice, as hosts with force_loopback_vbd do.
	StyleXVD DeviceStyle = iota
	// StyleNBD gives "nbd0", "nbd1", …, as hosts whose storage manager serves NBD do.
	StyleNBD
	// StyleSM gives "sm/backend/<sr uuid>/<vdi uuid>", as XenServer 7 and 8 and XCP-ng 8 do.
	StyleSM
)

// Config configures a Host.
type Config struct {
	// Dir is the directory of all files of the host; it must exist. The path of a unix
	// socket is limited to about 100 bytes, so Dir should be short.
	Dir string
	// Loop makes VBD.plug make loop devices instead of links to the image files. It needs
	// root and /dev/loop-control.
	Loop bool
	// Maker, if not nil, makes the devices. Loop has no effect then.
	Maker DeviceMaker
	// Style determines the device names.
	Style DeviceStyle
	// NBDUnplugWait is the time for which an unplug under StyleNBD waits until the device
	// is closed. 0 means the 10 minutes of xapi's helper.
	NBDUnplugWait time.Duration
	// DataDestroyWait is the time for which VDI.data_destroy waits until the VDI has no
	// VBDs. 0 means xapi's 4 seconds.
	DataDestroyWait time.Duration
	// Logger gets one debug line per call, without session refs. nil discards.
	Logger *slog.Logger
}

// closeTimeout is the time for which Close waits for devices that are open.
const closeTimeout = 30 * time.Second

// Host is a simulated XenServer host. All methods may be called concurrently.
type Host struct {
	cfg    Config
	log    *slog.Logger
	ctx    context.Context // ends at Close; releases every waiting call
	cancel context.CancelFunc
	wg     sync.WaitGroup // the accept loop and the connections

	closeTimeout time.Duration // the constant, except in a test of it

	mu       sync.Mutex // guards the fields below
	changed  chan struct{}
	closed   bool
	listener net.Listener // nil while stopped
	conns    map[net.Conn]struct{}
	restarts int
	faults   faults
	onCall   *callHook // nil without OnCall
	calls    []Call
	events   []Event
	store
}

// VBD is a snapshot of a VBD record, for assertions.
type VBD struct {
	UUID, Ref, VDI    string // VDI is the uuid of the VDI
	Device            string // relative to the device directory; stays after unplug
	Mode              string // "RO" or "RW"
	CurrentlyAttached bool
	OtherConfig       map[string]string
	Foreign           bool // made by AddForeignVBD
}

// Event is a change of the state of a VBD.
type Event struct {
	Time   time.Time
	VBD    string // uuid
	Change string // "created", "plugged", "unplugged" or "destroyed"
}

// Call is one call that reached the host, well-formed or not.
type Call struct {
	Method string
	Local  bool // made by, or being, a local login, as opposed to a client's session
}

// Start makes a host under cfg.Dir and listens on its socket. The caller must
// Close it.
func Start(cfg Config) (*Host, error) {
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("xapitest: %w", err)
	}
	cfg.Dir = dir
	if cfg.NBDUnplugWait == 0 {
		cfg.NBDUnplugWait = 10 * time.Minute
	}
	if cfg.DataDestroyWait == 0 {
		cfg.DataDestroyWait = 4 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	h := &Host{
		cfg: cfg, log: cfg.Logger, ctx: ctx, cancel: cancel,
		changed: make(chan struct{}),
		conns:   map[net.Conn]struct{}{},
		faults:  newFaults(),
		store:   newStore(),

		closeTimeout: closeTimeout,
	}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	if err = h.prepare(); err == nil {
		err = h.Resume()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("xapitest: %w", err)
	}
	return h, nil
}

func (h *Host) prepare() error {
	for _, dir := range []string{h.DeviceDir(), h.imageDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if h.cfg.Style == StyleNBD && h.cfg.Maker == nil {
		if err := h.prepareNBD(); err != nil {
			return err
		}
	}
	inventory := fmt.Sprintf("PRODUCT_BRAND='Simulated'\nINSTALLATION_UUID='%s'\nCONTROL_DOMAIN_UUID='%s'\n"+
		"MANAGEMENT_INTERFACE='xenbr0'\nMANAGEMENT_ADDRESS_TYPE='IPv4'\nBUILD_NUMBER='0'\n",
		h.host.uuid, h.dom0.uuid)
	return os.WriteFile(h.Inventory(), []byte(inventory), 0o644)
}

// Close stops the server, ends waiting calls, removes all devices and waits for all
// goroutines. Its error names the devices that are still open, which the kernel removes with
// their last descriptor. A second Close does nothing.
func (h *Host) Close() error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil
	}
	h.closed = true
	h.mu.Unlock()
	h.cancel()
	h.Stop()
	h.wg.Wait()

	h.mu.Lock()
	defer h.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), h.closeTimeout)
	defer cancel()
	var errs []error
	for name, d := range h.devices {
		errs = append(errs, d.remove(ctx))
		delete(h.devices, name)
	}
	h.notify()
	return errors.Join(errs...)
}

// Socket returns the path of xapi's unix socket.
func (h *Host) Socket() string { return filepath.Join(h.cfg.Dir, "xapi") }

// DeviceDir returns the directory that simulates the host's /dev. VBD.device is relative to
// it.
func (h *Host) DeviceDir() string { return filepath.Join(h.cfg.Dir, "dev") }

// SysDir returns the directory that simulates the host's /sys. Under StyleNBD
// block/nbdN/pid exists while nbdN is bound, and contains a number that is unique to the
// binding.
func (h *Host) SysDir() string { return filepath.Join(h.cfg.Dir, "sys") }

// NBDDir returns the directory that simulates the host's /var/run/nonpersistent/nbd. Under
// StyleNBD it has a file N while nbdN is bound: a JSON object with the source of its data,
// "path", a socket, and "exportname".
func (h *Host) NBDDir() string { return filepath.Join(h.cfg.Dir, "var", "run", "nonpersistent", "nbd") }

// Inventory returns the path of the host's xensource-inventory.
func (h *Host) Inventory() string { return filepath.Join(h.cfg.Dir, "xensource-inventory") }

func (h *Host) imageDir() string { return filepath.Join(h.cfg.Dir, "images") }

// ControlDomainUUID returns the uuid of the control domain's VM.
func (h *Host) ControlDomainUUID() string { return h.dom0.uuid }

// InstallationUUID returns the uuid of the host.
func (h *Host) InstallationUUID() string { return h.host.uuid }

// VBDs returns all VBDs in the order of their creation.
func (h *Host) VBDs() []VBD {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.snapshot()
}

// Events returns the events of all VBDs since the start or the last ResetEvents, oldest
// first.
func (h *Host) Events() []Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Event(nil), h.events...)
}

// Calls returns the calls since the start or the last ResetCalls, in order of arrival.
func (h *Host) Calls() []Call {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Call(nil), h.calls...)
}

// ResetCalls empties the list that Calls returns.
func (h *Host) ResetCalls() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = nil
}

// ResetEvents empties the list that Events returns.
func (h *Host) ResetEvents() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.events = nil
}

// Wait waits until condition returns true for the host's VBDs. It calls condition at once
// and after each change of a VBD, a VDI or a session, at each arriving call, and when an
// unplug under StyleNBD has disconnected the device.
// The error is the cause of ctx's end, or net.ErrClosed after Close.
func (h *Host) Wait(ctx context.Context, condition func(vbds []VBD) bool) error {
	for {
		h.mu.Lock()
		vbds, changed, closed := h.snapshot(), h.changed, h.closed
		h.mu.Unlock()
		if condition(vbds) { // without the lock: it may call Events or Calls
			return nil
		}
		if closed {
			return net.ErrClosed
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// notify wakes all goroutines that wait for a change. h.mu is held.
func (h *Host) notify() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// waitChange unlocks h.mu until the next change. It returns false if the host is closing.
// h.mu is held.
func (h *Host) waitChange(ctx context.Context) bool {
	changed := h.changed
	h.mu.Unlock()
	defer h.mu.Lock()
	select {
	case <-changed:
		return true
	case <-ctx.Done():
		return false
	}
}
