package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"xapi-nbd/auth"
	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
	"xapi-nbd/vdi"
	"xapi-nbd/vdi/blockdev"
	"xapi-nbd/xapi"
)

// service is the parts of xapi-nbd, put together. newService makes it, run uses
// it up.
type service struct {
	cfg       config
	log       *slog.Logger
	always    *slog.Logger // for lines that no log level hides
	client    *xapi.Client
	local     *xapi.Local
	rechecks  *auth.Rechecker
	disks     *vdi.Manager
	control   *control
	server    *nbd.Server
	listeners []net.Listener
	ready     latch // xapi has answered
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

// The pauses between looks for VBDs that were left behind: when the last look
// removed all it found, and, growing up to that, when it did not.
const (
	recoverEvery = 5 * time.Minute
	recoverAgain = 5 * time.Second
)

// newService opens everything that can fail at start: the state folder, the
// certificate where it is indispensable, the listeners. Its errors carry exit
// codes.
func newService(ctx context.Context, cfg config, log, always *slog.Logger) (*service, error) {
	s := &service{cfg: cfg, log: log, always: always, ready: newLatch()}
	cert, err := openCertificate(cfg, log)
	if err != nil {
		return nil, usageError(err)
	}
	s.client = xapi.New(xapi.Config{Socket: cfg.XapiSocket, Logger: log})
	s.local = xapi.NewLocal(s.client, vdi.Originator)
	s.rechecks = auth.NewRechecker(s.local, time.Duration(cfg.SessionRecheck), log)
	if s.disks, err = vdi.Open(diskConfig(cfg, s.client, s.local, log)); err != nil {
		return nil, usageError(err)
	}
	policy := &tlsPolicy{
		setting: cfg.TLS, cert: cert, ready: s.ready,
		networks: auth.NewNetworkPolicy(s.local, purposeTTL),
	}
	s.server = &nbd.Server{
		Exporter: &exporter{
			sessions: auth.NewAuthorizer(s.client), local: s.local, rechecks: s.rechecks,
			disks: s.disks, ready: s.ready,
		},
		TLSPolicy:           policy.mode,
		MaxConns:            cfg.MaxConnections,
		MaxInflightBytes:    int64(cfg.MaxInflightBytes),
		HandshakeTimeout:    time.Duration(cfg.HandshakeTimeout),
		FirstRequestTimeout: time.Duration(cfg.FirstRequestTimeout),
		IdleTimeout:         time.Duration(cfg.IdleTimeout),
		Logger:              log,
	}
	if cert != nil {
		s.server.TLSConfig = nbdtls.ServerConfig(cert)
	}
	if s.listeners, err = listenAll(ctx, cfg); err != nil {
		err = errors.Join(err, s.disks.Close(ctx))
		return nil, &exitError{exitBind, err}
	}
	s.control = newControl(filepath.Join(cfg.StateDir, controlName), s.disks, log)
	return s, nil
}

// diskConfig is how a vdi.Manager works for the service, and for cleaning up
// without it. The folder that holds the devices stands for the host's root, so
// that what tells about them is looked for beside it.
func diskConfig(cfg config, client *xapi.Client, local *xapi.Local, log *slog.Logger) vdi.Config {
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
// only where there is no service without it; otherwise every connection tries
// again.
func openCertificate(cfg config, log *slog.Logger) (*nbdtls.Reloader, error) {
	if cfg.Certfile == "" {
		return nil, nil
	}
	cert, err := nbdtls.NewReloader(cfg.Certfile, log)
	if err != nil && cfg.TLS == tlsRequire {
		return nil, fmt.Errorf("certfile: %w", err)
	}
	if err != nil {
		log.Error("no usable certificate yet; clients that need TLS are refused", "err", err)
	}
	return cert, nil
}

// run serves until stop ends and then stops in order: drain, detach, exit. A
// hurry that ends skips the draining, never the detaching.
func (s *service) run(stop, hurry context.Context) error {
	var background, serving sync.WaitGroup
	ctx, cancel := context.WithCancelCause(stop)
	for _, l := range s.listeners {
		s.always.Info("listening on "+l.Addr().String(), "version", buildinfo.Version())
		serving.Go(func() {
			if err := s.server.Serve(context.WithoutCancel(ctx), l); !errors.Is(err, nbd.ErrServerClosed) {
				cancel(&exitError{exitBind, fmt.Errorf("listener failed: %w", err)})
			}
		})
	}
	notify(daemon.SdNotifyReady + "\nSTATUS=waiting for xapi")
	background.Go(func() { s.control.serve(ctx) })
	background.Go(func() {
		if err := s.meetXapi(ctx); err != nil {
			cancel(err)
			return
		}
		s.keepRecovering(ctx)
	})
	background.Go(func() { s.rechecks.Run(ctx) })

	<-ctx.Done()
	cause := context.Cause(ctx)
	notify(daemon.SdNotifyStopping)
	s.log.Info("stopping", "reason", cause)
	background.Wait()
	err := s.shutdown(hurry)
	serving.Wait()
	s.client.Close()
	if stop.Err() == nil {
		return errors.Join(cause, err) // not asked to stop, but forced to
	}
	return err
}

// meetXapi waits until xapi answers for the first time, as long as startup_wait
// allows.
func (s *service) meetXapi(ctx context.Context) error {
	wait := ctx
	if s.cfg.StartupWait > 0 {
		var cancel context.CancelFunc
		wait, cancel = context.WithTimeout(ctx, time.Duration(s.cfg.StartupWait))
		defer cancel()
	}
	session, err := s.client.WaitLogin(wait, vdi.Originator)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return &exitError{exitUnreachable, fmt.Errorf("xapi unreachable within startup_wait (%v): %w", s.cfg.StartupWait, err)}
	}
	s.local.Adopt(session)
	s.ready.open()
	s.log.Info("ready to serve", "xapi", s.cfg.XapiSocket)
	notify("STATUS=serving")
	return nil
}

// keepRecovering removes what earlier processes left behind, at once, whenever
// something was left behind by this one, and every few minutes, for what could
// not be removed before.
func (s *service) keepRecovering(ctx context.Context) {
	again := recoverAgain
	for {
		pause := recoverEvery
		if _, err := s.disks.Recover(ctx); err != nil && ctx.Err() == nil {
			pause, again = again, min(2*again, recoverEvery)
			s.log.Error("recovery is incomplete", "err", err, "again_in", pause.String())
		} else {
			again = recoverAgain
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-s.disks.RecoveryWanted():
			// Not at once: what was just given up needs a moment too.
			timer.Reset(recoverAgain)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// shutdown drains for half of stop_timeout at most and leaves the rest to the
// detaching.
func (s *service) shutdown(hurry context.Context) error {
	stopTimeout := time.Duration(s.cfg.StopTimeout)
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	drain, stopDraining := context.WithTimeout(ctx, stopTimeout/2)
	defer stopDraining()
	defer context.AfterFunc(hurry, stopDraining)()
	if err := s.server.Shutdown(drain); err != nil {
		s.log.Warn("connections were cut off", "err", err)
	}
	err := s.disks.Close(ctx)
	if lerr := s.local.Close(ctx); lerr != nil {
		s.log.Debug("cannot log out", "err", lerr)
	}
	if err != nil {
		return &exitError{exitLeft, err}
	}
	s.log.Info("stopped")
	return nil
}

// notify tells systemd, where there is one.
func notify(state string) { _, _ = daemon.SdNotify(false, state) }
