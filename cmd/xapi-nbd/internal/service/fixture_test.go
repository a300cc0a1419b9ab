package service

import (
	"bytes"
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/config"
	"xapi-nbd/cmd/xapi-nbd/internal/logging"
)

// insideService is a service in the test's own process.
type insideService struct {
	*Service
	w *world

	mu   sync.Mutex    // guards the fields below
	next config.Config // the settings that a reload reads
	fail error         // the error of the read, if not nil
	log  bytes.Buffer
}

// Write implements io.Writer, for the log.
func (s *insideService) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(p)
}

func (s *insideService) logged() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// settings returns the settings of w.args, with a change.
func (w *world) settings(change func(*config.Config)) config.Config {
	cfg := config.Default()
	cfg.Listen = []string{"127.0.0.1:0"}
	cfg.Certfile = w.Trust.Server
	cfg.XapiSocket, cfg.Inventory, cfg.DeviceDir = w.host.Socket(), w.host.Inventory(), w.host.DeviceDir()
	cfg.StateDir = filepath.Join(w.dir, "state")
	if change != nil {
		change(&cfg)
	}
	return cfg
}

// make makes a service without running it.
func (w *world) make(change func(*config.Config)) *insideService {
	w.t.Helper()
	s := &insideService{w: w, next: w.settings(change)}
	level := new(slog.LevelVar)
	log, always := logging.New(level, s.next, s)
	var err error
	read := func() (config.Config, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.next, s.fail
	}
	o := Options{Config: s.next, Log: log, Always: always, Reloading: Reloading{Read: read, Level: level}}
	if s.Service, err = New(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// inside runs a service until the end of the test. It returns when xapi has answered. The log
// must contain no session.
func (w *world) inside(change func(*config.Config)) *insideService {
	w.t.Helper()
	s := w.make(change)
	stop, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(stop, context.Background()) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			w.t.Error(err)
		}
		w.WantNoSecrets("the log", s.logged())
	})
	select {
	case <-s.ready:
	case <-time.After(patience):
		w.t.Fatal("the service does not meet xapi")
	}
	return s
}

// reloadWith reloads with other settings.
func (s *insideService) reloadWith(change func(*config.Config)) {
	s.w.t.Helper()
	s.mu.Lock()
	change(&s.next)
	s.mu.Unlock()
	s.reload(s.w.t.Context())
}

// at returns the n-th address of the service.
func (s *insideService) at(n int) endpoint {
	return endpoint{"tcp", s.listening.addrs()[n].String()}
}
