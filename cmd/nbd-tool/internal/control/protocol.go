package control

// The commands.
const (
	CommandStatus   = "status"   // answered at once
	CommandPause    = "pause"    // stop the background copy
	CommandResume   = "resume"   // continue it
	CommandComplete = "complete" // answered when the mirror is complete or has failed to complete
	CommandCancel   = "cancel"   // end the mirror; the secondary stays incomplete
	CommandWait     = "wait"     // answered when the secondary is in sync or the mirror has ended
)

// Commands are all commands, in the order of the help text.
var Commands = []string{CommandStatus, CommandPause, CommandResume, CommandComplete, CommandCancel, CommandWait}

// The values of Request.Then.
const (
	ThenPivot = "pivot" // serve clients from the secondary from then on
	ThenStop  = "stop"  // end the connections of clients
)

// Request is a line of a client.
type Request struct {
	Command string `json:"command"`
	// Then and Verify belong to CommandComplete. Then is required.
	Then   string `json:"then,omitempty"`
	Verify bool   `json:"verify,omitempty"` // read both ends and compare them first
}

// Reply is the answer to a Request.
type Reply struct {
	OK     bool    `json:"ok"`
	Error  string  `json:"error,omitempty"`  // the reason, unless OK
	Status *Status `json:"status,omitempty"` // after the command; nil for a request that is invalid
}

// Status is the state of a mirror. Sizes are in bytes.
type Status struct {
	// State is "copying" (the secondary is behind), "mirroring" (writes go to both ends, and
	// the rest is copied), "in sync" (both are equal), "completing" (writes wait for the end),
	// and, when the mirror has ended, "pivoted" or "stopped" (the secondary is complete),
	// "cancelled", "detached" or "failed" (it is incomplete).
	State string `json:"state"`
	// Mode is "background" (writes do not wait for the secondary) or "blocking" (they are
	// answered when both ends have them).
	Mode    string  `json:"mode"`
	Paused  bool    `json:"paused"`
	Ended   bool    `json:"ended"`   // the state does not change any more
	Serving string  `json:"serving"` // "primary", "secondary" or "none": where clients read and write
	Size    int64   `json:"size"`
	Percent float64 `json:"percent"` // of Size, what is not Dirty
	// Dirty is what has to be copied, once or again.
	Dirty int64 `json:"dirty"`
	// Copied counts the bytes that the copy has dealt with, repetitions and holes included;
	// Sent counts those that were written to the secondary as data, also for clients.
	Copied int64 `json:"copied"`
	Sent   int64 `json:"sent"`
	Rate   int64 `json:"rate"` // of the copy, in bytes per second, lately
	// Converges is false while clients write as fast as the copy runs.
	Converges bool `json:"converges"`
	// SecondsLeft is an estimate of the time until both ends are equal; null if it is not known.
	SecondsLeft *int64 `json:"seconds_left"`
	Stalls      int64  `json:"stalls"` // writes that took the secondary longer than --stall
	Losses      int64  `json:"losses"` // connections that were lost or made again, of both ends
	// Complete is true only if the secondary has everything that was written to the primary
	// until the completion.
	Complete  bool     `json:"complete"`
	LastError string   `json:"last_error"` // the newest of either end, also one that was overcome
	Listening []string `json:"listening"`  // the addresses on which clients are served
	PID       int      `json:"pid"`
}
