package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"xapi-nbd/auth"
	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
	"xapi-nbd/vdi"
	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// Service is a running xapi-nbd. [New] makes it; [Service.Run] may be called once. Its other
// methods may be called concurrently.
type Service struct {
	settings  atomic.Pointer[config.Config] // of the moment
	log       *slog.Logger
	always    *slog.Logger // for lines that no log level hides
	started   time.Time
	client    *xapi.Client
	local     *xapi.Local
	rechecks  *auth.Rechecker
	disks     *vdi.Manager
	policy    *tlsPolicy
	rates     *rates
	progress  progress
	health    *health
	metrics   *metrics // nil: off
	server    *nbd.Server
	listening *listeners
	retries   *retries
	lockError error // of the first attempt to lock the state folder; nil: locked
	locked    latch // the state folder is ours
	ready     latch // xapi has answered
	draining  *drainState

	logDropped func() int64
	reloading  Reloading
	reloads    chan struct{}   // receives like Reloading.Requests, see askReload
	upgrades   <-chan struct{} // see Options

	// About upgrades, see handover.go.
	predecessor *Predecessor                   // nil: none
	inCharge    latch                          // the predecessor has handed over, or there was none
	changing    chan struct{}                  // holds one token while a reload or an upgrade goes on
	control     atomic.Pointer[control.Server] // from startControl on
	successor   *newProcess                    // after an upgrade: its pipe of orders stays open
	handedOver  time.Time                      // when that was
	replaced    atomic.Bool                    // another process serves new clients
	retired     chan struct{}                  // closed when this process has given up everything but its connections
	lifetime    context.Context                // of Run
	stop        context.CancelCauseFunc        // ends Run as its argument stop does
	end         context.CancelCauseFunc        // ends Run as if it ended by itself
	inFront     context.Context                // of Run, ends before retire returns
	endCharge   context.CancelFunc
	charge      sync.WaitGroup // what only the process in charge does, until inFront ends
}

// Options are the arguments of [New].
type Options struct {
	Config config.Config
	Log    *slog.Logger
	Always *slog.Logger // for lines that no log level hides; nil: Log

	// LogDropped returns the number of lines that the log has dropped; nil: none.
	LogDropped func() int64
	Reloading  Reloading

	Upgrades    <-chan struct{} // receives when the installed program is to take over; nil: never
	Predecessor *Predecessor    // the process that this one is to replace; nil: none
}

// Reloading is how a service gets other settings. The zero value is never to get them.
type Reloading struct {
	Requests <-chan struct{}               // receives when the settings are to be read again
	Read     func() (config.Config, error) // reads them
	Level    *slog.LevelVar                // the level of the log, to be set
}

// latch is open from the first call of open on. Its zero value must not be
// used: see newLatch.
type latch chan struct{}

func newLatch() latch { return make(latch) }

// open may be called once.
func (l latch) open() { close(l) }

func (l latch) isOpen() bool {
	select {
	case <-l:
		return true
	default:
		return false
	}
}

// New opens the certificate, the state folder and the listeners. It fails only if an
// administrator has to act, with an error that matches ErrStateFolder or ErrListen, or with
// that of the certificate; Run tries everything else again.
func New(ctx context.Context, o Options) (*Service, error) {
	cfg, log := o.Config, o.Log
	s := &Service{
		log: log, always: cmp.Or(o.Always, log), started: time.Now(),
		locked: newLatch(), ready: newLatch(), draining: newDrainState(),
		inCharge: newLatch(), retired: make(chan struct{}), changing: make(chan struct{}, 1), upgrades: o.Upgrades, predecessor: o.Predecessor,
		rates:      newRates(cfg.RateLimit, cfg.RateLimitVDI),
		logDropped: o.LogDropped, reloading: o.Reloading, reloads: make(chan struct{}, 1),
	}
	s.settings.Store(&cfg)
	s.retries = newRetries(log, func() { notify("STATUS=" + s.statusText()) })
	s.metrics = newMetrics(s, cfg.Metrics)
	s.health = &health{observe: s.metrics.called, back: func() { s.disks.Wake() }}
	cert, err := openCertificate(cfg, log, o.Predecessor.hasCertificate())
	if err != nil {
		return nil, err
	}
	s.client = xapi.New(xapi.Config{Socket: cfg.XapiSocket, Logger: log, Observe: s.health.called})
	s.local = xapi.NewLocal(s.client, vdi.KeptOriginator())
	s.rechecks = auth.NewRechecker(s.local, time.Duration(cfg.SessionRecheck), log)
	disks := diskConfig(cfg, s.client, s.local, log)
	disks.Locks = o.Predecessor.takeLocks()
	s.disks = vdi.New(disks)
	switch s.lockError = lockState(s.disks, cfg.StateDir); {
	case isPermanent(s.lockError), s.lockError != nil && o.Predecessor != nil:
		return nil, s.lockError
	case s.lockError == nil:
		s.locked.open()
	}
	ready := firstResponse{s.ready, s.started.Add(startupGrace), s.locked}
	s.policy = &tlsPolicy{
		ready: ready, draining: s.draining,
		networks: auth.NewNetworkPolicy(s.local, PurposeTTL),
	}
	s.policy.settings.Store(newTLSSettings(cfg, cert))
	s.server = &nbd.Server{
		Exporter: &exporter{
			sessions: auth.NewAuthorizer(s.client, s.local), timeout: s.attachTimeout, rechecks: s.rechecks,
			disks: s.disks, rates: s.rates, ready: ready, draining: s.draining,
			mayWrite: func() bool { return s.settings.Load().AllowWrite }, admit: s.policy.admit,
		},
		TLSConfig: s.policy.config(),
		TLSPolicy: s.policy.mode,
		Limits:    serverLimits(cfg),
		Logger:    log,
	}
	serve := func(ln net.Listener) error { return s.server.Serve(context.WithoutCancel(ctx), ln) }
	if s.listening, err = newListeners(ctx, cfg, o.Predecessor, s.retries, serve, s.listensOn); err != nil {
		return nil, errors.Join(err, s.disks.Close(ctx))
	}
	return s, nil
}

// Ready returns a channel that is closed when xapi has responded for the first time: from
// then on clients are served.
func (s *Service) Ready() <-chan struct{} { return s.ready }

// Addrs returns the addresses that clients may connect to now.
func (s *Service) Addrs() []net.Addr { return s.listening.addrs() }

// attachTimeout is the setting of the moment.
func (s *Service) attachTimeout() time.Duration {
	return time.Duration(s.settings.Load().AttachTimeout)
}

// diskConfig returns the configuration of a vdi.Manager for the service, and for a clean-up
// without it. Files that describe devices are searched beside the folder of the devices, in
// the place of the host's root.
func diskConfig(cfg config.Config, client *xapi.Client, local *xapi.Local, log *slog.Logger) vdi.Config {
	root := filepath.Dir(filepath.Clean(cfg.DeviceDir))
	return vdi.Config{
		Client: client, Local: local,
		Roots: blockdev.Roots{
			Sys: filepath.Join(root, "sys"), NBD: filepath.Join(root, "var/run/nonpersistent/nbd"),
		},
		StateDir: cfg.StateDir, DeviceDir: cfg.DeviceDir, Inventory: cfg.Inventory, DirectIO: cfg.DirectIO,
		MaxVBDs: cfg.MaxVBDs, AttachTimeout: time.Duration(cfg.AttachTimeout), Linger: time.Duration(cfg.Linger),
		Logger: log,
	}
}

// openCertificate loads the certificate. One that cannot be used yet is fatal
// only where there is no service without it, or if required is set; otherwise every
// connection tries again.
func openCertificate(cfg config.Config, log *slog.Logger, required bool) (*nbdtls.Reloader, error) {
	if cfg.Certfile == "" {
		return nil, nil
	}
	cert, err := nbdtls.NewReloader(cfg.Certfile, log)
	if err != nil && (required || cfg.TLS == config.TLSRequire) {
		return nil, fmt.Errorf("certfile: %w", err)
	}
	if err != nil {
		log.Error("no usable certificate yet; clients that need TLS are refused", "err", err)
	}
	return cert, nil
}

// Run serves until stop ends, then waits for requests in progress and detaches every VDI,
// within stop_timeout. When hurry ends it cuts connections at once, and still detaches. Run
// may be called once. The error is nil after a clean stop, matches vdi.ErrLeft if VBDs are
// left, and names the cause if the service had to end by itself.
func (s *Service) Run(stop, hurry context.Context) error {
	var background sync.WaitGroup
	stop, s.stop = context.WithCancelCause(stop)
	defer s.stop(nil)
	ctx, cancel := context.WithCancelCause(stop)
	s.lifetime, s.end = ctx, cancel
	s.inFront, s.endCharge = context.WithCancel(ctx)
	defer s.endCharge()
	// Before the notification: after it other programs may ask for the status.
	if s.locked.isOpen() {
		if err := s.startControl(ctx, &background); err != nil && s.predecessor != nil {
			cancel(fmt.Errorf("control socket: %w", err))
		}
	}
	background.Go(func() {
		if err := s.begin(ctx, &background); err != nil {
			cancel(err)
		}
	})
	background.Go(func() { s.rechecks.Run(ctx) })
	background.Go(func() { s.progress.keep(ctx, s.server.Conns) })
	background.Go(func() { s.waitDrained(ctx, cancel) })
	background.Go(func() { s.watchListeners(ctx, cancel) })
	background.Go(func() { s.waitReplaced(ctx, cancel) })
	background.Go(func() { s.passReloads(ctx) })
	follow := func() {}
	if s.predecessor == nil {
		s.listening.start(ctx)
		s.inCharge.open()
	} else if err := s.takeOver(ctx); err != nil {
		cancel(err)
	} else {
		follow = func() { s.followPredecessor(ctx) }
	}
	s.startCharge()
	background.Go(follow)
	background.Go(func() { s.keepUpgrading(ctx) })

	<-ctx.Done()
	s.draining.ending()
	cause := context.Cause(ctx)
	notify(daemon.SdNotifyStopping)
	s.log.Info("stopping", "reason", cause)
	s.changing <- struct{}{} // an upgrade that goes on decides who is to stop; no other one begins
	s.passOn(stop)
	var others sync.WaitGroup
	if stop.Err() != nil && s.servesNewClients() {
		others.Go(func() { s.stopReplaced(hurry) })
	}
	background.Wait()
	s.charge.Wait()
	err := s.shutdown(hurry, others.Wait)
	s.listening.serving.Wait()
	s.client.Close()
	s.passOn(stop) // the signal may have come only now
	if stop.Err() == nil && !isOrderly(cause) {
		return errors.Join(cause, err) // not asked to stop, but forced to
	}
	return err
}

// isOrderly reports whether the service has ended by itself because its work was done.
func isOrderly(cause error) bool {
	return slices.ContainsFunc([]error{errDrained, errReplaced, errEndReplaced, errDrainTimeout},
		func(orderly error) bool { return errors.Is(cause, orderly) })
}

// startCharge starts what only the process in charge does. The first of it, the notification
// of systemd, is sent before startCharge returns, unless this process is not in charge yet.
func (s *Service) startCharge() {
	ready := func() { notify(daemon.SdNotifyReady + "\nSTATUS=" + s.statusText()) }
	if s.inCharge.isOpen() {
		ready()
		ready = func() {}
	}
	start := func(f func(context.Context)) {
		s.charge.Go(func() {
			select {
			case <-s.inCharge:
				f(s.inFront)
			case <-s.inFront.Done():
			}
		})
	}
	start(func(ctx context.Context) {
		ready()
		s.keepNotifying(ctx)
	})
	start(func(ctx context.Context) { s.metrics.serve(ctx, s.log, s.retries) })
	start(s.keepReloading)
	start(func(ctx context.Context) {
		select {
		case <-s.ready:
			s.disks.KeepRecovering(ctx)
		case <-ctx.Done():
		}
	})
}

// startControl answers on the control socket, which belongs to the process that holds
// the lock of the state folder. It returns after the first attempt to make the socket, with
// the error of that attempt.
func (s *Service) startControl(ctx context.Context, background *sync.WaitGroup) error {
	name := control.SocketName
	if s.predecessor != nil { // until it has this name
		name = control.ReplacedName(s.disks.Generation())
	}
	s.removeOldSockets()
	server := control.NewServer(ctx, s.controlPath(name), s, s.log)
	s.control.Store(server)
	first := make(chan error, 1)
	background.Go(func() { s.serveControl(ctx, server, first) })
	return <-first
}

// serveControl answers on the control socket until ctx ends. first receives the result of
// the first attempt to make the socket. The service works without one: the attempts go on.
func (s *Service) serveControl(ctx context.Context, server *control.Server, first chan<- error) {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		server.Close()
	})
	open := func(ctx context.Context) (net.Listener, error) {
		l, err := server.Listen(ctx)
		select {
		case first <- err:
		default: // a later attempt
		}
		return l, err
	}
	keepServing(ctx, s.retries, "make the control socket", open, server.Serve)
	if !stop() {
		<-ended
	}
}

// Recover implements [Service].
func (s *Service) Recover(ctx context.Context) control.RecoverReport {
	result, err := s.disks.Recover(ctx)
	return newRecoverReport(result, err)
}

// listensOn logs an address that is served from now on.
func (s *Service) listensOn(addr net.Addr) {
	s.always.Info("listening on "+addr.String(), "version", buildinfo.Version())
}

// watchListeners cancels when a socket of systemd has failed. It returns when ctx ends, too.
func (s *Service) watchListeners(ctx context.Context, cancel context.CancelCauseFunc) {
	select {
	case err := <-s.listening.failed:
		cancel(&kindError{ErrListen, fmt.Errorf("listener failed: %w", err)})
	case <-ctx.Done():
	}
}

// meetXapi waits until xapi answers for the first time, as long as startup_wait
// allows.
func (s *Service) meetXapi(ctx context.Context) error {
	cfg := s.settings.Load()
	wait := ctx
	if cfg.StartupWait > 0 {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, time.Duration(cfg.StartupWait))
		defer cancel()
	}
	session, err := s.client.WaitLogin(wait, vdi.KeptOriginator())
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return &kindError{ErrXapiUnreachable, fmt.Errorf("xapi unreachable within startup_wait (%v): %w", cfg.StartupWait, err)}
	}
	s.local.Adopt(session)
	s.ready.open()
	s.log.Info("ready to serve", "xapi", cfg.XapiSocket)
	notify("STATUS=serving")
	return nil
}

// shutdown drains for half of stop_timeout at most and leaves the rest to the
// detaching. waitOthers waits for the end of the processes that this one stops.
func (s *Service) shutdown(hurry context.Context, waitOthers func()) error {
	stopTimeout := time.Duration(s.settings.Load().StopTimeout)
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	drain, stopDraining := context.WithTimeout(ctx, stopTimeout/2)
	defer stopDraining()
	defer context.AfterFunc(hurry, stopDraining)()
	if err := s.server.Shutdown(drain); err != nil {
		s.log.Warn("connections were cut off", "err", err)
	}
	s.disks.BeginClose()
	waitOthers() // Close counts the VBDs that they have left behind
	err := s.disks.Close(ctx)
	if lerr := s.local.Close(ctx); lerr != nil {
		s.log.Debug("cannot log out", "err", lerr)
	}
	if err != nil {
		return &kindError{vdi.ErrLeft, err}
	}
	s.log.Info("stopped")
	return nil
}
