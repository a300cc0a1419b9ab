// Package interop holds what must stay true for the clients of the original
// service, which was written in OCaml: its dialogues, typed from the protocol's
// meaning and from how its clients behave, played against our server.
//
// Not here yet: programs in OCaml, and the original library as a live peer.
package interop
