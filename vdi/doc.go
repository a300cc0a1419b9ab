// Package vdi attaches VDIs to the control domain and detaches them again,
// whatever happens in between.
//
// An attachment is a VBD of this host's control domain and the open device
// behind it. There is one per VDI; every connection to that VDI shares it, each
// authorized on its own. Its life:
//
//	                 client's session                         local session
//	none ──create──► created ──journal──► recorded ──plug──► plugged ──open──► attached
//	 ▲                  │                    │                  │                 │ last user leaves:
//	 │                  ▼                    ▼                  ▼                 ▼ close the device
//	 └────forget──── destroyed ◄──destroy── unplugged ◄──────unplug───────────────┘
//
// What a crash leaves behind at each point, and how [Manager.Recover] finds it:
//
//	after create    a VBD that is in no journal: found by its tag in other_config
//	after journal   the same, in the journal too
//	during plug     unknown: unplug, "already detached" is fine, destroy
//	plugged         unplug, destroy
//	after unplug    destroy
//	after destroy   an entry without a VBD: forget
//
// Three rules make that hold. The tag is born with the VBD. The entry is
// durable before the plug and goes only when the VBD is certainly gone. And
// whatever undoes an attachment uses a fresh local session and a time limit of
// its own: the client's session and context may have ended long before.
package vdi
