package service

import (
	"context"
	"errors"
	"log/slog"
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
	"xapi-nbd/vdi"
)

// replacedTimeout bounds a request to a process that was replaced.
const replacedTimeout = 2 * time.Second

// Replaced are the processes of a state folder that upgrades have replaced and that have not
// ended. Its methods may be called concurrently.
type Replaced struct {
	dir  string
	log  *slog.Logger
	list func() ([]int, error) // their generations
}

// NewReplaced returns those of a state folder as a command finds them that asks no service.
// A process that serves new clients may be listed, too; it does not answer under the name
// that it will have when it has been replaced.
func NewReplaced(stateDir string) *Replaced {
	return &Replaced{
		dir: stateDir, log: slog.New(slog.DiscardHandler),
		list: func() ([]int, error) { return vdi.LivingGenerations(stateDir) },
	}
}

// replacedOnes returns the processes that this one has replaced.
func (s *Service) replacedOnes() *Replaced {
	list := s.disks.OtherGenerations
	if !s.servesNewClients() {
		list = func() ([]int, error) { return nil, nil }
	}
	return &Replaced{dir: s.settings.Load().StateDir, log: s.log, list: list}
}

// servesNewClients reports whether no other process is to serve them.
func (s *Service) servesNewClients() bool {
	return !s.replaced.Load() && (s.predecessor == nil || s.predecessor.isFollowed())
}

// generations returns those of the processes, the oldest first.
func (r *Replaced) generations() []int {
	all, err := r.list()
	if err != nil {
		r.log.Warn("cannot look for processes that were replaced", "err", err)
		return nil
	}
	slices.Sort(all)
	return all
}

// socket returns the path of the control socket of one of the processes.
func (r *Replaced) socket(generation int) string {
	return filepath.Join(r.dir, control.ReplacedName(generation))
}

// ask sends a request to one of the processes.
func (r *Replaced) ask(ctx context.Context, generation int, method, target string, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, replacedTimeout)
	defer cancel()
	err := control.Ask(ctx, r.socket(generation), method, target, answer)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // else it has just ended
		r.log.Warn("a process that was replaced does not answer", "generation", generation, "err", err)
	}
	return err
}

// Status returns the status of each process that answers. The IDs of their connections get
// the generation in front.
func (r *Replaced) Status(ctx context.Context) (all []control.StatusReport) {
	for _, generation := range r.generations() {
		var report control.StatusReport
		if r.ask(ctx, generation, http.MethodGet, "/status", &report) != nil {
			continue
		}
		for i := range report.Connections {
			report.Connections[i].ID = strconv.Itoa(generation) + "/" + report.Connections[i].ID
		}
		all = append(all, report)
	}
	return all
}

// Disconnect closes connections and returns their number. id is that of Status, or the uuid
// of a VDI.
func (r *Replaced) Disconnect(ctx context.Context, id string) (count int) {
	of, own, isOne := strings.Cut(id, "/")
	for _, generation := range r.generations() {
		switch {
		case !isOne:
			own = id
		case of != strconv.Itoa(generation):
			continue
		}
		var report control.DisconnectReport
		if r.ask(ctx, generation, http.MethodPost, "/disconnect?id="+url.QueryEscape(own), &report) == nil {
			count += report.Count
		}
	}
	return count
}

// busy returns how many of the processes have connections. One that does not answer counts.
func (r *Replaced) busy(ctx context.Context) int {
	all := r.generations()
	n := len(all)
	for _, generation := range all {
		var report control.StatusReport
		err := r.ask(ctx, generation, http.MethodGet, "/status", &report)
		if errors.Is(err, os.ErrNotExist) || err == nil && len(report.Connections) == 0 {
			n--
		}
	}
	return n
}

// serving returns how many connections the processes serve.
func (r *Replaced) serving(ctx context.Context) (n int) {
	for _, report := range r.Status(ctx) {
		n += report.Limits.Connections
	}
	return n
}

// End ends the processes as a stop of the service does, also while another process serves
// new clients, which it leaves alone. limit is how long each may take, after which it is
// killed. ended is the number of processes.
func (r *Replaced) End(limit time.Duration) (ended int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	all, err := r.list()
	if err != nil {
		return 0, err
	}
	pids := make(processIDs)
	for _, generation := range all {
		pid, err := proc.SocketOwner(ctx, r.socket(generation))
		if errors.Is(err, os.ErrNotExist) {
			continue // it is not replaced, or has just ended
		}
		if err != nil {
			return 0, err
		}
		var report control.EndReport
		switch err := r.ask(ctx, generation, http.MethodPost, "/end", &report); {
		case err == nil && report.Error != "":
			continue // it is about to replace another one
		case err != nil:
			_ = syscall.Kill(pid, syscall.SIGTERM) // it has just been connected to
		}
		pids[generation] = pid
	}
	r.waitEnd(ctx, pids)
	return len(pids), nil
}

// processIDs are those of processes by their generation; 0 is not known.
type processIDs map[int]int

// signal sends a signal to those of the processes that live, except one generation. It
// returns the generations of all that live.
func (r *Replaced) signal(pids processIDs, sig syscall.Signal, except int) (living []int) {
	all, err := vdi.LivingGenerations(r.dir)
	if err != nil {
		r.log.Warn("cannot look for processes that were replaced", "err", err)
	}
	for _, generation := range all {
		pid, wanted := pids[generation]
		if !wanted {
			continue
		}
		living = append(living, generation)
		// A process that holds the lock of its generation has not ended, so its ID is its own.
		if pid != 0 && generation != except {
			_ = syscall.Kill(pid, sig) // it fails if the process has just ended
		}
	}
	return living
}

// stop ends the processes, as the service ends: by SIGTERM, with a second one when hurry
// ends, within limit, after which they are killed. The one with the generation stopping is
// about to stop already: a second signal would cut its connections.
func (r *Replaced) stop(hurry context.Context, limit time.Duration, stopping int) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	pids := make(processIDs)
	for _, generation := range r.generations() {
		pid, err := proc.SocketOwner(ctx, r.socket(generation))
		if err != nil && generation != stopping {
			r.log.Warn("cannot signal a process that was replaced", "generation", generation, "err", err)
		}
		pids[generation] = pid
	}
	if len(pids) == 0 {
		return
	}
	r.log.Info("stopping the processes that were replaced", "generations", slices.Sorted(maps.Keys(pids)))
	r.signal(pids, syscall.SIGTERM, stopping)
	defer context.AfterFunc(hurry, func() { r.signal(pids, syscall.SIGTERM, 0) })()
	r.waitEnd(ctx, pids)
}

// waitEnd waits for the end of the processes. When ctx ends it kills those that are left.
func (r *Replaced) waitEnd(ctx context.Context, pids processIDs) {
	ended := func() bool { return len(r.signal(pids, 0, 0)) == 0 }
	if waitUntil(ctx, ended) {
		return
	}
	if left := r.signal(pids, syscall.SIGKILL, 0); len(left) > 0 {
		r.log.Error("processes that were replaced do not end; they are killed", "generations", left)
	}
	killed, cancel := context.WithTimeout(context.Background(), killTime)
	defer cancel()
	waitUntil(killed, ended)
}

// killTime is how long a process that was killed may take to end.
const killTime = time.Second

// waitUntil calls done again and again until it returns true, or until ctx ends, when it
// returns false.
func waitUntil(ctx context.Context, done func() bool) bool {
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// stopReplaced ends the processes that this one has replaced, within stop_timeout.
func (s *Service) stopReplaced(hurry context.Context) {
	stopping := 0
	if s.predecessor != nil && s.predecessor.stopping.Load() {
		stopping = s.predecessor.handover.Generation
	}
	s.replacedOnes().stop(hurry, time.Duration(s.settings.Load().StopTimeout), stopping)
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
