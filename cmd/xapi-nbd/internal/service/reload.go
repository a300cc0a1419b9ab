package service

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
	"xapi-nbd/nbd"
	nbdtls "xapi-nbd/tls"
	"xapi-nbd/vdi"
)

// reloadable are the keys that SIGHUP changes; the others need a restart.
var reloadable = []string{
	"port", "listen", "certfile", "tls", "max_connections", "max_vbds", "max_inflight_bytes",
	"handshake_timeout", "attach_timeout", "first_request_timeout", "idle_timeout", "linger",
	"startup_wait", "stop_timeout", "drain_timeout", "log_level", "rate_limit", "rate_limit_vdi", "allow_write",
}

// keepReloading reloads whenever it is asked to, until ctx ends.
func (s *Service) keepReloading(ctx context.Context) {
	for s.waitReload(ctx) {
		if !s.reload(ctx) {
			s.askReload() // again, of the process that is in charge next
			return
		}
	}
}

// waitReload waits for a request to reload, and returns false if ctx ends first.
func (s *Service) waitReload(ctx context.Context) bool {
	select {
	case <-s.reloading.Requests:
		return true
	case <-s.reloads:
		return true
	case <-ctx.Done():
		return false
	}
}

// askReload makes waitReload return. It may be called any number of times before that.
func (s *Service) askReload() {
	select {
	case s.reloads <- struct{}{}:
	default: // a reload is to come, and begins after this call
	}
}

// passReloads passes requests to reload on to the process that has replaced this one: those
// that came during the upgrade, and those that come later, because their sender did not know
// of it. It returns when ctx ends.
func (s *Service) passReloads(ctx context.Context) {
	select {
	case <-s.retired:
	case <-ctx.Done():
		return
	}
	for s.waitReload(ctx) {
		s.askReload()
		s.passReload()
	}
}

// passReload orders the process that has replaced this one to reload, if this one was asked
// to.
func (s *Service) passReload() {
	select {
	case <-s.reloading.Requests:
	case <-s.reloads:
	default:
		return
	}
	err := errNoSuccessor
	if s.successor != nil {
		err = s.successor.order(orderReload)
	}
	if err != nil {
		s.log.Error("SIGHUP: not passed on to the process that serves new clients", "err", err)
		return
	}
	s.log.Info("SIGHUP: passed on to the process that serves new clients")
}

// errNoSuccessor is the error of a process that gave up without an upgrade of its own.
var errNoSuccessor = errors.New("another process has taken over, and this one does not know which")

// reload reads the settings again and applies those that are reloadable, all of them or
// none. No connection ends because of it. It returns false if ctx ended before it began.
func (s *Service) reload(ctx context.Context) bool {
	if !s.beginChange(ctx) {
		return false
	}
	defer s.endChange()
	notify(daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec())
	defer notify(daemon.SdNotifyReady)
	cfg, err := s.reloading.Read()
	if err != nil {
		s.log.Error("SIGHUP: configuration not reloaded", "err", err)
		return true
	}
	next, changed, later := merge(*s.settings.Load(), cfg)
	if err := s.apply(ctx, next); err != nil {
		s.log.Error("SIGHUP: configuration not reloaded", "err", err)
		return true
	}
	s.log.Info("SIGHUP: configuration reloaded", "changed", changed)
	if len(later) > 0 {
		s.log.Warn("SIGHUP: these settings need a restart", "keys", later)
	}
	return true
}

// apply applies settings.
func (s *Service) apply(ctx context.Context, next config.Config) error {
	security, err := s.nextTLS(next)
	if err != nil {
		return err
	}
	if err := s.listening.change(ctx, next.ListenAddrs()); err != nil {
		return err
	}
	// Nothing fails from here on.
	s.policy.settings.Store(security)
	s.settings.Store(&next)
	s.reloading.Level.Set(logging.Levels[next.LogLevel])
	s.server.SetLimits(serverLimits(next))
	s.disks.SetLimits(vdi.Limits{
		MaxVBDs: next.MaxVBDs, AttachTimeout: time.Duration(next.AttachTimeout), Linger: time.Duration(next.Linger),
	})
	s.rates.set(next.RateLimit, next.RateLimitVDI)
	return nil
}

// serverLimits returns the limits that the settings give the NBD server.
func serverLimits(cfg config.Config) nbd.Limits {
	return nbd.Limits{
		MaxConns:            cfg.MaxConnections,
		MaxInflightBytes:    int64(cfg.MaxInflightBytes),
		HandshakeTimeout:    time.Duration(cfg.HandshakeTimeout),
		FirstRequestTimeout: time.Duration(cfg.FirstRequestTimeout),
		IdleTimeout:         time.Duration(cfg.IdleTimeout),
	}
}

// nextTLS returns the settings of TLS. A new certfile must be usable, else the old one stays.
func (s *Service) nextTLS(next config.Config) (*tlsSettings, error) {
	now := s.policy.settings.Load()
	if next.Certfile == now.file {
		again := *now
		again.policy = next.TLS
		if next.TLS == config.TLSRequire && again.cert.Available() != nil {
			return nil, fmt.Errorf("certfile: %w", again.cert.Available())
		}
		return &again, nil
	}
	if next.Certfile == "" {
		return newTLSSettings(next, nil), nil
	}
	cert, err := nbdtls.NewReloader(next.Certfile, s.log)
	if err != nil {
		return nil, fmt.Errorf("certfile: %w", err)
	}
	return newTLSSettings(next, cert), nil
}

// merge returns old with the values that next has for reloadable keys. changed are the
// reloadable keys that differ, later the other keys that differ.
func merge(old, next config.Config) (merged config.Config, changed, later []string) {
	merged = old
	to, from := reflect.ValueOf(&merged).Elem(), reflect.ValueOf(next)
	for i := range from.NumField() {
		key := from.Type().Field(i).Tag.Get("toml")
		if key == "" || reflect.DeepEqual(to.Field(i).Interface(), from.Field(i).Interface()) {
			continue
		}
		if !slices.Contains(reloadable, key) {
			later = append(later, key)
			continue
		}
		to.Field(i).Set(from.Field(i))
		changed = append(changed, key)
	}
	return merged, changed, later
}
