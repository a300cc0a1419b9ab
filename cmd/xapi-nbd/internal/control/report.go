package control

import (
	"strconv"
	"time"

	"xapi-nbd/vdi"
)

// The states of the service.
const (
	StateLocking  = "waiting for the state folder"
	StateWaiting  = "waiting for xapi"
	StateServing  = "serving"
	StateDraining = "draining"
	// StateReplaced: a later process has taken over, and this one serves the connections
	// that it has.
	StateReplaced = "replaced by an upgrade"
	// StateNoAnswer is that of a report which the command status makes itself, when only
	// processes that were replaced answer.
	StateNoAnswer = "no process that serves new clients answers"
)

// StatusReport is the answer to GET /status, and the output of status --json. It holds
// no secrets: of the name of an export only the VDI.
type StatusReport struct {
	Version     string             `json:"version"`
	PID         int                `json:"pid"`
	Generation  int                `json:"generation"` // 0 while waiting for the state folder
	State       string             `json:"state"`
	Now         time.Time          `json:"now"`
	Started     time.Time          `json:"started"`
	Listening   []string           `json:"listening"`
	Limits      LimitsReport       `json:"limits"`
	Xapi        XapiReport         `json:"xapi"`
	Retries     []RetryReport      `json:"retries"`           // actions that have failed and are tried again
	LogDropped  int64              `json:"log_lines_dropped"` // since the start
	Attachments []AttachmentReport `json:"attachments"`
	Leftovers   []LeftoverReport   `json:"leftovers"` // VBDs that still have to be removed, the oldest first
	Connections []ConnectionReport `json:"connections"`
	Refused     map[string]int64   `json:"refused"` // since the start, by reason
	Journal     []string           `json:"journal"` // uuids of VBDs: in use, or left behind
	JournalErr  string             `json:"journal_error,omitempty"`

	// Replaced are the earlier processes that an upgrade has replaced and that still serve
	// connections. The IDs of those begin with the generation of the process: "1/17".
	Replaced []StatusReport `json:"replaced,omitempty"`
}

// LimitsReport has limits and their use.
type LimitsReport struct {
	Connections      int   `json:"connections"`
	MaxConnections   int   `json:"max_connections"`
	VBDs             int   `json:"vbds"`
	MaxVBDs          int   `json:"max_vbds"`
	InflightBytes    int64 `json:"inflight_bytes"`
	MaxInflightBytes int64 `json:"max_inflight_bytes"`
	RateLimit        int64 `json:"rate_limit"`     // bytes per second; 0 is none
	RateLimitVDI     int64 `json:"rate_limit_vdi"` // the same, of each VDI
}

// AttachmentReport is an attached VDI; see vdi.Status.
type AttachmentReport struct {
	VDI     string    `json:"vdi"`
	VDIName string    `json:"vdi_name,omitempty"`
	VMName  string    `json:"vm_name,omitempty"`
	VBD     string    `json:"vbd,omitempty"`
	Size    int64     `json:"size"`
	Mode    string    `json:"mode"` // ro, or rw if its client may write
	Stage   string    `json:"stage"`
	Users   int       `json:"users"`
	Since   time.Time `json:"since"`

	Blocks BlocksReport `json:"blocks"`
}

// BlocksReport says which blocks of a VDI have data; see vdi.Blocks.
type BlocksReport struct {
	Known  bool   `json:"known"`
	Reason string `json:"reason,omitempty"`
	Data   int64  `json:"data"`
}

// LeftoverReport is a VBD that is left to be removed; see vdi.Leftover.
type LeftoverReport struct {
	VBD         string    `json:"vbd,omitempty"` // none: a VBD.create that was not answered
	VDI         string    `json:"vdi,omitempty"`
	Since       time.Time `json:"since"`
	Attempts    int       `json:"attempts"`
	LastError   string    `json:"last_error,omitempty"`
	NextAttempt time.Time `json:"next_attempt,omitzero"` // none: an attempt is under way
}

// ConnectionReport is a connection, in the handshake or serving.
type ConnectionReport struct {
	ID            string    `json:"id"`
	Peer          string    `json:"peer"`
	TLS           string    `json:"tls,omitempty"` // the version
	Since         time.Time `json:"since"`
	State         string    `json:"state"` // negotiating or serving
	VDI           string    `json:"vdi,omitempty"`
	Began         time.Time `json:"began,omitzero"` // when it was served first
	Size          int64     `json:"size"`           // of the disk, in bytes
	Position      int64     `json:"position"`       // the offset behind the last READ or WRITE
	Percent       int       `json:"percent"`        // position of size, rounded down
	SecondsLeft   *int64    `json:"seconds_left,omitempty"`
	Requests      int64     `json:"requests"`
	Bytes         int64     `json:"bytes"`            // read and written
	Written       int64     `json:"written"`          // of these
	Rate          int64     `json:"bytes_per_second"` // on average since it was served first
	InFlight      int       `json:"in_flight"`
	InFlightBytes int64     `json:"in_flight_bytes"`
	LastError     string    `json:"last_error,omitempty"`
}

// XapiReport says how the calls to xapi went.
type XapiReport struct {
	Socket     string     `json:"socket"`
	Reachable  bool       `json:"reachable"` // the last call was answered
	LastAnswer *time.Time `json:"last_answer,omitempty"`
	LastError  string     `json:"last_error,omitempty"`
	LastFailed *time.Time `json:"last_failed,omitempty"`
}

// RetryReport is an action that failed and is tried again and again.
type RetryReport struct {
	Action    string    `json:"action"`
	Since     time.Time `json:"since"`    // the first attempt
	Attempts  int       `json:"attempts"` // all of which failed
	LastError string    `json:"last_error"`
	Next      time.Time `json:"next_attempt"`
}

// SocketName is the name of the control socket in the state folder.
const SocketName = "control"

// RecoverReport is the answer to POST /recover.
type RecoverReport struct {
	vdi.Recovered
	Error   string `json:",omitempty"`
	Failure string `json:",omitempty"` // the kind of error: unreachable, inventory or left
}

// DisconnectReport is the answer to POST /disconnect.
type DisconnectReport struct {
	Found bool `json:"found"` // there was such a connection
	Count int  `json:"count"` // how many were closed
}

// DrainReport is the answer to POST /drain.
type DrainReport struct {
	Serving int    `json:"serving"`         // connections that are waited for
	Error   string `json:"error,omitempty"` // why the service does not drain
}

// UndrainReport is the answer to POST /undrain.
type UndrainReport struct {
	Changed bool   `json:"changed"`         // the service drained, and does not any more
	Error   string `json:"error,omitempty"` // why it goes on draining
}

// EndReport is the answer to POST /end.
type EndReport struct {
	Error string `json:"error,omitempty"` // why the process does not end
}

// UpgradeReport is the answer to POST /upgrade.
type UpgradeReport struct {
	PID     int    `json:"pid,omitempty"`     // of the new process
	Version string `json:"version,omitempty"` // of the new process
	Waiting int    `json:"waiting"`           // connections that the old process still serves
	Error   string `json:"error,omitempty"`   // why the old process goes on as before
}

// ReplacedName returns the name of the control socket, in the state folder, of the process
// with that generation after it was replaced.
func ReplacedName(generation int) string { return SocketName + "." + strconv.Itoa(generation) }

// PerSecond returns n per second, 0 if took is not positive.
func PerSecond(n int64, took time.Duration) int64 {
	if took <= 0 {
		return 0
	}
	return int64(float64(n) / took.Seconds())
}
