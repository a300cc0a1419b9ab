// Package vdi attaches VDIs to the control domain of this host, for reading or writing, and
// detaches them again, also after errors, lost connections and crashes.
//
// [Open] returns a [Manager]. [Manager.Recover] removes the VBDs that earlier processes
// left behind. [Manager.Attach] attaches a VDI and returns a [Disk], which reads its data,
// says which blocks have data and which have changed, and is closed by the caller.
// [Manager.AttachWritable] returns a [WritableDisk], which is also written.
// [Manager.Close] detaches everything. [Manager.Status] and [Manager.Leftovers] return the
// current state.
//
// # Attachments
//
// An attachment is a VBD of this host's control domain and its open device. There is one
// per VDI, and all connections to the VDI share it, or for writing those of one session. It goes through these stages. (The
// program has the same list, transitions in stage.go; a test compares the two.)
//
//	creating   ──► recording   xapi has created the VBD
//	creating   ──► detaching   xapi refused or did not respond, or the call cannot be recorded
//	recording  ──► plugging    the VBD's uuid is durable in the journal
//	recording  ──► detaching   the VBD cannot be recorded, or xapi did not return its uuid
//	plugging   ──► opening     the VBD is plugged
//	plugging   ──► detaching   the VBD cannot be plugged
//	opening    ──► attached    the device is open and a client waits for it
//	opening    ──► detaching   the device cannot be opened, or no client waits any more
//	attached   ──► lingering   the last connection was lost abruptly, and only read
//	attached   ──► detaching   the last connection was closed by the client or by the service
//	attached   ──► lost        another client of xapi has taken the device away, or uses a VDI
//	                           that is written
//	lingering  ──► attached    a client has reconnected
//	lingering  ──► detaching   no client has; or the VDI, the slot or the host is needed; or a
//	                           client wants changed blocks, which xapi lists only if detached
//	lost       ──► detaching   the last connection has ended
//	detaching  ──► forgetting  the VBD does not exist any more
//	detaching  ──► gone        there was no VBD and no entry
//	detaching  ──► left        the attempt failed: the VBD is a leftover now
//	forgetting ──► gone        the entry is removed
//	forgetting ──► left        the entry cannot be removed: it is a leftover now
//
// A crash leaves something behind at each stage. [Manager.Recover] finds it:
//
//	creating    a VBD may exist, or appear later; it is found by its nonce, which is in its
//	            tag in other_config and in the list of pending calls
//	recording   a VBD, perhaps in the journal; it is found by its tag
//	plugging    a VBD of the journal in an unknown state: wait until xapi has finished
//	opening, attached, lingering, lost   a plugged VBD: unplug, destroy, remove the entry
//	detaching   a VBD: the steps that are left of these
//	forgetting  an entry without a VBD: remove the entry
//
// This works because of four rules. VBD.create sets the tag, so no VBD is ever without it.
// The entry is durable before the plug, and is removed only when the VBD does not exist any
// more. A detach uses a new local session and its own time limit: the client's session and
// context may have ended. And if the response to a call is lost, the state is read from
// xapi, never assumed.
//
// # VDIs that are written
//
// xapi does not keep a VM of this host from using a VDI that the control domain writes. So
// the rules of [ExclusiveError] are checked before VBD.create, after the plug and every
// second, and no write begins after one was seen to be broken. That cannot prevent anything.
//
// # Upgrades
//
// During an upgrade two processes work on one host. The new one inherits the locks of the
// state folder and of the host ([Manager.Locks]); the old one gives them up
// ([Manager.ReleaseLocks]) and keeps its attachments. Each process holds a lock of its own,
// which the tags of its VBDs name, and leaves alone the VBDs of processes whose lock is held.
// Both change the same journal.
//
// # Devices that are bound again
//
// On current hosts the device is one of 24 /dev/nbdN that all tools share, and backup tools
// destroy VBDs that are in their way. After such an unplug the device node can be bound to
// another disk, even under a descriptor that is still open. So after each read the binding
// is checked (see package blockdev) before the data may be used, and once a second the
// binding of every attachment is checked.
package vdi
