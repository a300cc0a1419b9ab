// Package vdi attaches VDIs to the control domain and detaches them again,
// whatever happens in between.
//
// An attachment is a VBD of this host's control domain and the open device
// behind it. There is one per VDI; every connection to that VDI shares it. Its
// life, as the program has it (arrows in stage.go; a test compares the two):
//
//	creating   ──► recording   xapi has made the VBD
//	creating   ──► detaching   it refused, or its answer was lost, or it cannot be recorded
//	recording  ──► plugging    the VBD's uuid is durable in the journal
//	recording  ──► detaching   it cannot be recorded, or its uuid was not heard
//	plugging   ──► opening     plugged, also if xapi had to be asked what became of it
//	plugging   ──► detaching   it cannot be plugged
//	opening    ──► attached    the device is open and somebody waits for it
//	opening    ──► detaching   it cannot be opened, or nobody waits any more
//	attached   ──► lingering   the last connection was lost abruptly
//	attached   ──► detaching   the last connection ended softly, or was sent away
//	attached   ──► lost        somebody else has taken the device away
//	lingering  ──► attached    the client has come back
//	lingering  ──► detaching   it has not; or the VDI, the place or the host is needed, or a
//	                           client wants changed blocks, which cannot be had while attached
//	lost       ──► detaching   the last connection has ended
//	detaching  ──► forgetting  the VBD is certainly gone and its entry is to go
//	detaching  ──► gone        nothing was begun
//	detaching  ──► left        the one attempt failed: it is a leftover now
//	forgetting ──► gone        the entry is gone
//	forgetting ──► left        the entry cannot be removed: it is a leftover now
//
// What a crash leaves behind at each stage, and how [Manager.Recover] finds it:
//
//	creating    perhaps a VBD, now or later, found by its nonce: the tag in
//	            other_config has it, and the list of calls that may be executed
//	recording   a VBD, perhaps in the journal, found by its tag
//	plugging    a VBD of the journal in an unknown state: xapi is asked, and waited for
//	opening, attached, lingering, lost   unplug, destroy, forget
//	detaching   what is left of that
//	forgetting  an entry without a VBD: forget
//
// Four rules make that hold. The tag is born with the VBD. The entry is durable
// before the plug and goes only when the VBD is certainly gone. Whatever undoes
// an attachment uses a fresh local session and a time limit of its own: the
// client's session and context may have ended long before. And when the answer
// to a call was lost, xapi is asked what became of it, never assumed.
//
// # Devices that become others
//
// On current hosts the device is one of 24 /dev/nbdN that all tools share, and
// backup tools destroy VBDs that are in their way. After such an unplug the node
// can stand for another disk, under a descriptor that is still open. So each
// read is followed by a look at the marks of the binding (see package blockdev)
// before its data may be used, and every attachment is looked at once a second.
package vdi
