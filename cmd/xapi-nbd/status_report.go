package main

import (
	"context"
	"os"
	"strings"
	"time"

	"xapi-nbd/cmd/internal/buildinfo"
)

// The states of the service.
const (
	stateLocking  = "waiting for the state folder"
	stateWaiting  = "waiting for xapi"
	stateServing  = "serving"
	stateDraining = "draining"
)

// statusReport is the answer to GET /status. It holds no secrets: of an export's
// name only the VDI.
type statusReport struct {
	Version     string             `json:"version"`
	PID         int                `json:"pid"`
	State       string             `json:"state"`
	Now         time.Time          `json:"now"`
	Started     time.Time          `json:"started"`
	Listening   []string           `json:"listening"`
	Limits      limitsReport       `json:"limits"`
	Xapi        xapiReport         `json:"xapi"`
	Retries     []retryReport      `json:"retries"`           // what cannot be had yet
	LogDropped  int64              `json:"log_lines_dropped"` // since the start
	Attachments []attachmentReport `json:"attachments"`
	Leftovers   []leftoverReport   `json:"leftovers"` // what is left to be removed, the oldest first
	Connections []connectionReport `json:"connections"`
	Refused     map[string]int64   `json:"refused"` // since the start, by reason
	Journal     []string           `json:"journal"` // uuids of VBDs: in use, or left behind
	JournalErr  string             `json:"journal_error,omitempty"`
}

// limitsReport is what may be used, and what is.
type limitsReport struct {
	Connections      int   `json:"connections"`
	MaxConnections   int   `json:"max_connections"`
	VBDs             int   `json:"vbds"`
	MaxVBDs          int   `json:"max_vbds"`
	InflightBytes    int64 `json:"inflight_bytes"`
	MaxInflightBytes int64 `json:"max_inflight_bytes"`
	RateLimit        int64 `json:"rate_limit"`     // bytes per second; 0 is none
	RateLimitVDI     int64 `json:"rate_limit_vdi"` // the same, of each VDI
}

// attachmentReport is a vdi.Status.
type attachmentReport struct {
	VDI     string    `json:"vdi"`
	VDIName string    `json:"vdi_name,omitempty"`
	VMName  string    `json:"vm_name,omitempty"`
	VBD     string    `json:"vbd,omitempty"`
	Size    int64     `json:"size"`
	Stage   string    `json:"stage"`
	Users   int       `json:"users"`
	Since   time.Time `json:"since"`

	Blocks blocksReport `json:"blocks"`
}

// blocksReport is a vdi.Blocks.
type blocksReport struct {
	Known  bool   `json:"known"`
	Reason string `json:"reason,omitempty"`
	Data   int64  `json:"data"`
}

// leftoverReport is a vdi.Leftover.
type leftoverReport struct {
	VBD         string    `json:"vbd,omitempty"` // none: a VBD.create that was not answered
	VDI         string    `json:"vdi,omitempty"`
	Since       time.Time `json:"since"`
	Attempts    int       `json:"attempts"`
	LastError   string    `json:"last_error,omitempty"`
	NextAttempt time.Time `json:"next_attempt,omitzero"` // none: an attempt is under way
}

type connectionReport struct {
	ID            string    `json:"id"`
	Peer          string    `json:"peer"`
	TLS           string    `json:"tls,omitempty"` // the version
	Since         time.Time `json:"since"`
	State         string    `json:"state"` // negotiating or serving
	VDI           string    `json:"vdi,omitempty"`
	Began         time.Time `json:"began,omitzero"` // when it was served first
	Size          int64     `json:"size"`           // of the disk, in bytes
	Position      int64     `json:"position"`       // the offset behind the last READ
	Percent       int       `json:"percent"`        // position of size, rounded down
	SecondsLeft   *int64    `json:"seconds_left,omitempty"`
	Requests      int64     `json:"requests"`
	Bytes         int64     `json:"bytes"`
	Rate          int64     `json:"bytes_per_second"` // on average since it was served first
	InFlight      int       `json:"in_flight"`
	InFlightBytes int64     `json:"in_flight_bytes"`
	LastError     string    `json:"last_error,omitempty"`
}

// askAfter is how long xapi may have been silent before it is asked for the sake
// of a status.
const (
	askAfter   = 10 * time.Second
	askTimeout = 2 * time.Second
)

// nameTimeout is how long a status waits for the names of VMs.
const nameTimeout = time.Second

// status tells what the service is doing.
func (s *service) status(ctx context.Context) statusReport {
	if s.ready.isOpen() && s.health.quietFor() > askAfter {
		ctx, cancel := context.WithTimeout(ctx, askTimeout)
		_, _ = s.local.Check(ctx) // health has the outcome
		cancel()
	}
	if s.ready.isOpen() && s.health.report().Reachable {
		ctx, cancel := context.WithTimeout(ctx, nameTimeout)
		s.disks.NameVMs(ctx)
		cancel()
	}
	cfg := s.settings.Load()
	r := statusReport{
		Version: buildinfo.Version(), PID: os.Getpid(), State: s.state(), Now: time.Now(), Started: s.started,
		Xapi:        s.health.report(),
		Retries:     s.retries.report(),
		LogDropped:  s.droppedLines(),
		Attachments: []attachmentReport{}, Leftovers: []leftoverReport{}, Connections: []connectionReport{}, Journal: []string{},
		Refused: s.refusedByReason(),
	}
	r.Xapi.Socket = cfg.XapiSocket
	for _, addr := range s.listening.addrs() {
		r.Listening = append(r.Listening, addr.String())
	}
	for _, a := range s.disks.Status() {
		r.Attachments = append(r.Attachments, attachmentReport{
			VDI: a.VDI, VDIName: a.VDIName, VMName: a.VMName, VBD: a.VBD, Size: a.Size,
			Stage: a.Stage, Users: a.Users, Since: a.Since, Blocks: blocksReport(a.Blocks),
		})
	}
	for _, l := range s.disks.Leftovers() {
		l.LastError = oneLine(l.LastError)
		r.Leftovers = append(r.Leftovers, leftoverReport(l))
	}
	r.Limits = limitsReport{
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
	return r
}

// droppedLines is how many lines the log did not take since the start.
func (s *service) droppedLines() int64 {
	if s.logDropped == nil {
		return 0
	}
	return s.logDropped()
}

func (s *service) connections() []connectionReport {
	all := []connectionReport{}
	now := time.Now()
	for _, c := range s.server.Conns() {
		r := connectionReport{
			ID: c.ID, Peer: c.Remote.String(), TLS: c.TLS, Since: c.Since, State: "negotiating",
			Requests: c.Requests, Bytes: c.Bytes, InFlight: c.InFlight, InFlightBytes: c.InFlightBytes,
			LastError: oneLine(c.LastError),
		}
		if c.Serving {
			r.State, r.Began, r.VDI = "serving", c.Began, strings.TrimPrefix(c.Export, "/")
			r.Rate = perSecond(c.Bytes, now.Sub(c.Began))
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

// refusedByReason counts refusals since the start by rule: each rule is there.
func (s *service) refusedByReason() map[string]int64 {
	all := s.server.Totals().Refusals
	for _, rule := range refusalRules() {
		all[rule] += 0
	}
	return all
}

// state is one of the states above.
func (s *service) state() string {
	switch {
	case s.draining.isOn():
		return stateDraining
	case s.ready.isOpen():
		return stateServing
	case s.locked.isOpen():
		return stateWaiting
	}
	return stateLocking
}

// perSecond is a rate; of no time it is none.
func perSecond(n int64, took time.Duration) int64 {
	if took <= 0 {
		return 0
	}
	return int64(float64(n) / took.Seconds())
}

// oneLine makes a text fit for a terminal: one line without control characters.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f && r < 0xa0 }), " ")
}

// disconnect cuts the connection with this ID, or all that are served from the VDI
// with this uuid, and returns how many those were.
func (s *service) disconnect(id string) (count int) {
	if s.server.Disconnect(id) {
		return 1
	}
	for _, c := range s.connections() {
		if c.VDI != "" && strings.EqualFold(c.VDI, id) && s.server.Disconnect(c.ID) {
			count++
		}
	}
	return count
}
