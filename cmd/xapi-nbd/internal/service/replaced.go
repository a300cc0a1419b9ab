package service

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/proc"
)

// replacedTimeout bounds a request to a process that was replaced.
const replacedTimeout = 2 * time.Second

// replacedOnes returns the generations of the processes that this one has replaced and that
// have not ended, the oldest first.
func (s *Service) replacedOnes() []int {
	if !s.servesNewClients() {
		return nil
	}
	all, err := s.disks.OtherGenerations()
	if err != nil {
		s.log.Warn("cannot look for processes that were replaced", "err", err)
		return nil
	}
	slices.Sort(all)
	return all
}

// servesNewClients reports whether no other process is to serve them.
func (s *Service) servesNewClients() bool {
	return !s.replaced.Load() && (s.predecessor == nil || s.predecessor.isFollowed())
}

// askReplaced sends a request to a process that was replaced.
func (s *Service) askReplaced(ctx context.Context, generation int, method, target string, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, replacedTimeout)
	defer cancel()
	err := control.Ask(ctx, s.controlPath(control.ReplacedName(generation)), method, target, answer)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // else it has just ended
		s.log.Warn("a process that was replaced does not answer", "generation", generation, "err", err)
	}
	return err
}

// replacedStatus returns the status of the processes that were replaced. The IDs of their
// connections get the generation in front.
func (s *Service) replacedStatus(ctx context.Context) (all []control.StatusReport) {
	for _, generation := range s.replacedOnes() {
		var r control.StatusReport
		if s.askReplaced(ctx, generation, http.MethodGet, "/status", &r) != nil {
			continue
		}
		for i := range r.Connections {
			r.Connections[i].ID = strconv.Itoa(generation) + "/" + r.Connections[i].ID
		}
		all = append(all, r)
	}
	return all
}

// disconnectReplaced cuts connections of processes that were replaced and returns their
// number. id is that of replacedStatus, or the uuid of a VDI.
func (s *Service) disconnectReplaced(ctx context.Context, id string) (count int) {
	of, own, isOne := strings.Cut(id, "/")
	for _, generation := range s.replacedOnes() {
		switch {
		case !isOne:
			own = id
		case of != strconv.Itoa(generation):
			continue
		}
		var r control.DisconnectReport
		if s.askReplaced(ctx, generation, http.MethodPost, "/disconnect?id="+url.QueryEscape(own), &r) == nil {
			count += r.Count
		}
	}
	return count
}

// replacedServing returns how many connections the processes that were replaced serve.
func (s *Service) replacedServing(ctx context.Context) (n int) {
	for _, r := range s.replacedStatus(ctx) {
		n += r.Limits.Connections
	}
	return n
}

// stopReplaced ends the processes that were replaced, as this one ends: by SIGTERM, with a
// second one when hurry ends, within stop_timeout, after which they are killed.
func (s *Service) stopReplaced(hurry context.Context) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(s.settings.Load().StopTimeout))
	defer cancel()
	pids := make(map[int]int) // by generation
	for _, generation := range s.replacedOnes() {
		pid, err := proc.SocketOwner(ctx, s.controlPath(control.ReplacedName(generation)))
		if err != nil {
			s.log.Warn("cannot signal a process that was replaced", "generation", generation, "err", err)
			continue
		}
		pids[generation] = pid
	}
	if len(pids) == 0 {
		return
	}
	// A process that holds the lock of its generation has not ended, so its ID is its own.
	signal := func(sig syscall.Signal, except int) (living []int) {
		living, err := s.disks.OtherGenerations()
		if err != nil {
			s.log.Warn("cannot look for processes that were replaced", "err", err)
		}
		for _, generation := range living {
			if pid, known := pids[generation]; known && generation != except {
				_ = syscall.Kill(pid, sig) // it fails if the process has just ended
			}
		}
		return living
	}
	s.log.Info("stopping the processes that were replaced", "generations", slices.Sorted(maps.Keys(pids)))
	stopping := 0 // one that stops already: a second signal would cut its connections
	if s.predecessor != nil && s.predecessor.stopping.Load() {
		stopping = s.predecessor.handover.Generation
	}
	signal(syscall.SIGTERM, stopping)
	defer context.AfterFunc(hurry, func() { signal(syscall.SIGTERM, 0) })()
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for len(signal(0, 0)) > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			if left := signal(syscall.SIGKILL, 0); len(left) > 0 {
				s.log.Error("processes that were replaced do not end; they are killed", "generations", left)
			}
			return
		}
	}
}

// removeOldSockets removes the control sockets of processes that were killed after they had
// been replaced.
func (s *Service) removeOldSockets() {
	living, err := s.disks.OtherGenerations()
	if err != nil {
		return
	}
	paths, _ := filepath.Glob(s.controlPath(control.SocketName + ".*")) // a correct pattern
	for _, path := range paths {
		generation, err := strconv.Atoi(strings.TrimPrefix(filepath.Ext(path), "."))
		if err == nil && !slices.Contains(living, generation) {
			_ = os.Remove(path)
		}
	}
}
