package service

import (
	"context"
	"os"
	"strings"
	"time"

	"xapi-nbd/cmd/internal/buildinfo"
	"xapi-nbd/cmd/xapi-nbd/internal/control"
	"xapi-nbd/cmd/xapi-nbd/internal/text"
	"xapi-nbd/vdi"
)

// A status makes a call to xapi if the last one ended over askAfter ago, and waits for it
// up to askTimeout.
const (
	askAfter   = 10 * time.Second
	askTimeout = 2 * time.Second
)

// nameTimeout is how long a status waits for the names of VMs.
const nameTimeout = time.Second

// Status implements [Service].
func (s *Service) Status(ctx context.Context) control.StatusReport {
	if s.ready.isOpen() && s.health.quietFor() > askAfter {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		_, _ = s.local.Check(ctx) // health records the result
		cancel()
	}
	if s.ready.isOpen() && s.health.report().Reachable {
		ctx, cancel := context.WithTimeout(ctx, nameTimeout)
		s.disks.NameVMs(ctx)
		cancel()
	}
	cfg := s.settings.Load()
	r := control.StatusReport{
		Version: buildinfo.Version(), PID: os.Getpid(), Generation: s.disks.Generation(), State: s.state(), Now: time.Now(), Started: s.started,
		Xapi:        s.health.report(),
		Retries:     s.retries.report(),
		LogDropped:  s.droppedLines(),
		Attachments: []control.AttachmentReport{}, Leftovers: []control.LeftoverReport{}, Connections: []control.ConnectionReport{}, Journal: []string{},
		Refused: s.refusedByReason(),
	}
	r.Xapi.Socket = cfg.XapiSocket
	for _, addr := range s.listening.addrs() {
		r.Listening = append(r.Listening, addr.String())
	}
	for _, a := range s.disks.Status() {
		r.Attachments = append(r.Attachments, control.AttachmentReport{
			VDI: a.VDI, VDIName: a.VDIName, VMName: a.VMName, VBD: a.VBD, Size: a.Size,
			Mode: modeOf(a), Stage: a.Stage, Users: a.Users, Since: a.Since, Blocks: control.BlocksReport(a.Blocks),
		})
	}
	for _, l := range s.disks.Leftovers() {
		l.LastError = text.OneLine(l.LastError)
		r.Leftovers = append(r.Leftovers, control.LeftoverReport(l))
	}
	r.Limits = control.LimitsReport{
		Connections: s.server.Serving(), MaxConnections: cfg.MaxConnections,
		VBDs: len(r.Attachments), MaxVBDs: cfg.MaxVBDs, MaxInflightBytes: int64(cfg.MaxInflightBytes),
		RateLimit: int64(cfg.RateLimit), RateLimitVDI: int64(cfg.RateLimitVDI),
	}
	r.Connections = s.connections()
	for _, c := range r.Connections {
		r.Limits.InflightBytes += c.InFlightBytes
	}
	journal, err := s.disks.Journal()
	if err != nil {
		r.JournalErr = err.Error()
	}
	r.Journal = append(r.Journal, journal...)
	r.Replaced = s.replacedOnes().Status(ctx)
	return r
}

// modeOf returns the mode of an attachment as export names have it.
func modeOf(a vdi.Status) string {
	if a.Write {
		return "rw"
	}
	return "ro"
}

// droppedLines returns the number of lines that the log has dropped since the start.
func (s *Service) droppedLines() int64 {
	if s.logDropped == nil {
		return 0
	}
	return s.logDropped()
}

func (s *Service) connections() []control.ConnectionReport {
	all := []control.ConnectionReport{}
	now := time.Now()
	for _, c := range s.server.Conns() {
		r := control.ConnectionReport{
			ID: c.ID, Peer: c.Remote.String(), TLS: c.TLS, Since: c.Since, State: "negotiating",
			Requests: c.Requests, Bytes: c.Bytes, Written: c.Written, InFlight: c.InFlight, InFlightBytes: c.InFlightBytes,
			LastError: text.OneLine(c.LastError),
		}
		if c.Serving {
			r.State, r.Began, r.VDI = "serving", c.Began, strings.TrimPrefix(c.Export, "/")
			r.Rate = control.PerSecond(c.Bytes, now.Sub(c.Began))
			r.Size, r.Position, r.Percent = c.Size, c.Position, percentRead(c)
			if left, ok := s.progress.left(now, c); ok {
				seconds := int64(left.Round(time.Second) / time.Second)
				r.SecondsLeft = &seconds
			}
		}
		all = append(all, r)
	}
	return all
}

// refusedByReason returns the number of refusals since the start by rule, also for rules
// without any.
func (s *Service) refusedByReason() map[string]int64 {
	all := s.server.Totals().Refusals
	for _, rule := range refusalRules() {
		all[rule] += 0
	}
	return all
}

// state returns one of the states of package control.
func (s *Service) state() string {
	switch {
	case s.replaced.Load():
		return control.StateReplaced
	case s.draining.isOn():
		return control.StateDraining
	case s.ready.isOpen():
		return control.StateServing
	case s.locked.isOpen():
		return control.StateWaiting
	}
	return control.StateLocking
}

// Disconnect implements [Service].
func (s *Service) Disconnect(id string) (count int) {
	if s.server.Disconnect(id) {
		return 1
	}
	for _, c := range s.connections() {
		if c.VDI != "" && strings.EqualFold(c.VDI, id) && s.server.Disconnect(c.ID) {
			count++
		}
	}
	return count + s.replacedOnes().Disconnect(s.lifetime, id)
}
