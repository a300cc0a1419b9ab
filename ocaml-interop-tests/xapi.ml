(* A xapi without disks: HTTP and XML-RPC on a unix socket, and of the Xen API
   what exporting a VDI needs.

   xapi SOCKET WIRE BOOTING

   WIRE is "xapi" for answers as xapi writes them, with strings and integers that
   carry no type, or "typed" for those that XmlRpc-Light writes. The first BOOTING
   calls are answered as by a host that is still starting. What there is to ask for
   is printed as lines "name value", then "ready". It ends with its standard input. *)

open Printf

type value = XmlRpc.value

(* ErrorDescription of xapi: the code and its parameters. *)
exception Failed of string list

let fail code params = raise (Failed (code :: params))
let internal text = fail "INTERNAL_ERROR" [ text ]
let handle_invalid cls ref = fail "HANDLE_INVALID" [ cls; ref ]

(* {1 Objects} *)

let uuid () =
  let digits n = String.init n (fun _ -> "0123456789abcdef".[Random.int 16]) in
  String.concat "-" [ digits 8; digits 4; digits 4; digits 4; digits 12 ]

let new_ref () = "OpaqueRef:" ^ uuid ()
let null = "OpaqueRef:NULL"

type session = {
  session_uuid : string;
  originator : string;
  permissions : string list option; (* None: root, who may do everything *)
}

type vdi = {
  vdi_ref : string;
  vdi_uuid : string;
  label : string;
  typ : string;
  shown_type : string; (* the name of the type in errors, which is another one *)
  size : int;
  on_plug : string -> string -> string list; (* of the refs of VDI and VBD: how a plug fails; [] if it works *)
}

type vbd = {
  vbd_uuid : string;
  vm : string;
  vdi : vdi;
  userdevice : int;
  mode : string;
  vbd_type : string;
  config : (string * string) list;
  mutable device : string; (* keeps its text after an unplug *)
  mutable attached : bool;
}

let dom0_uuid = uuid ()
let dom0 = new_ref ()
let sr = new_ref ()
let sr_uuid = uuid ()

let vdi ?(label = "") ?(typ = "user") ?(shown_type = "") ?(size = 1 lsl 30) on_plug =
  { vdi_ref = new_ref (); vdi_uuid = uuid (); label; typ; shown_type; size; on_plug }

(* The VDIs, by the names under which they are printed. *)
let vdis =
  let works _ _ = [] in
  [
    (* more bytes than 32 bits can count, and a text that tests escaping *)
    ("disk", vdi ~label:" a <b> & \"c\" 'd'  \xc3\xbc  " ~size:(5 lsl 40) works);
    ("in-use", vdi (fun vdi _ -> [ "VDI_IN_USE"; vdi; "resize" ]));
    ("in-use-by-sm", vdi (fun _ _ -> [ "VDI_IN_USE" ]));
    ("unmanaged", vdi (fun _ vbd -> [ "VDI_NOT_MANAGED"; vbd ]));
    ("missing", vdi (fun vdi _ -> [ "VDI_MISSING"; sr; vdi ]));
    ("no-pbd", vdi (fun _ _ -> [ "SR_HAS_NO_PBDS"; sr ]));
    ( "elsewhere",
      vdi (fun _ _ ->
          [ "SR_BACKEND_FAILURE_46"; ""; "The VDI is not available [opterr=VDI not detached cleanly]"; "" ]) );
    ("cbt", vdi ~typ:"cbt_metadata" ~shown_type:"CBT metadata" works);
  ]

let sessions : (string, session) Hashtbl.t = Hashtbl.create 16
let vbds : (string, vbd) Hashtbl.t = Hashtbl.create 16

let new_session originator permissions =
  let r = new_ref () in
  Hashtbl.replace sessions r { session_uuid = uuid (); originator; permissions };
  r

let vdi_of_ref r =
  match List.find_opt (fun (_, v) -> v.vdi_ref = r) vdis with
  | Some (_, v) -> v
  | None -> handle_invalid "VDI" r

let vbd_of_ref r =
  match Hashtbl.find_opt vbds r with Some b -> b | None -> handle_invalid "VBD" r

let session_of_ref r =
  match Hashtbl.find_opt sessions r with
  | Some s -> s
  | None -> fail "SESSION_INVALID" [ r ]

(* {1 Records} *)

let str s : value = `String s
let map l : value = `Struct (List.map (fun (k, v) -> (k, str v)) l)
let set l : value = `Array (List.map str l)
let no : value = `Boolean false
let moment : value = `DateTime (2026, 1, 2, 3, 4, 5, 0)

let session_record s : value =
  `Struct
    [
      ("uuid", str s.session_uuid); ("this_host", str null); ("this_user", str null);
      ("last_active", moment); ("pool", no); ("other_config", map []);
      ("is_local_superuser", `Boolean (s.permissions = None)); ("subject", str null);
      ("validation_time", moment); ("auth_user_sid", str ""); ("auth_user_name", str "");
      ("rbac_permissions", set (Option.value s.permissions ~default:[]));
      ("tasks", set []); ("parent", str null); ("originator", str s.originator);
      ("client_certificate", no);
    ]

let vbds_where f = Hashtbl.fold (fun r b l -> if f b then (r, b) :: l else l) vbds []

let vdi_record v : value =
  `Struct
    [
      ("uuid", str v.vdi_uuid); ("name_label", str v.label); ("name_description", str "");
      ("allowed_operations", set [ "snapshot"; "clone" ]); ("current_operations", map []);
      ("SR", str sr); ("VBDs", set (List.map fst (vbds_where (fun b -> b.vdi == v))));
      ("virtual_size", `Int v.size); ("physical_utilisation", `Int v.size);
      ("type", str v.typ); ("sharable", no); ("read_only", no); ("other_config", map []);
      ("location", str v.vdi_uuid); ("managed", `Boolean true); ("missing", no);
      ("parent", str null); ("is_a_snapshot", `Boolean true); ("snapshot_of", str null);
      ("snapshot_time", moment); ("tags", set []); ("cbt_enabled", no);
    ]

let vbd_record b : value =
  let possible = if b.attached then [ "unplug"; "unplug_force" ] else [ "attach"; "plug" ] in
  `Struct
    [
      ("uuid", str b.vbd_uuid); ("allowed_operations", set possible);
      ("current_operations", map []); ("VM", str b.vm); ("VDI", str b.vdi.vdi_ref);
      ("device", str b.device); ("userdevice", str (string_of_int b.userdevice));
      ("bootable", no); ("mode", str b.mode); ("type", str b.vbd_type);
      ("unpluggable", `Boolean true); ("storage_lock", no); ("empty", no);
      ("other_config", map b.config); ("currently_attached", `Boolean b.attached);
      ("status_code", `Int 0); ("status_detail", str ""); ("runtime_properties", map []);
      ("qos_algorithm_type", str ""); ("qos_algorithm_params", map []);
      ("qos_supported_algorithms", set []); ("metrics", str null);
    ]

let networks : value =
  let network label purpose : string * value =
    ( new_ref (),
      `Struct
        [
          ("uuid", str (uuid ())); ("name_label", str label); ("PIFs", set [ new_ref () ]);
          ("MTU", `Int 1500); ("other_config", map [ ("automatic", "true") ]);
          ("bridge", str label); ("managed", `Boolean true); ("purpose", set purpose);
        ] )
  in
  `Struct
    [ network "xenbr0" [ "nbd" ]; network "xenbr1" []; network "xapi0" [ "a new one"; "insecure_nbd" ] ]

(* {1 Parameters} *)

let text : value -> string = function
  | `String s -> s
  | v -> internal (sprintf "Failure(\"Expected string, got '%s'\")" (XmlRpc.dump v))

let flag : value -> bool = function
  | `Boolean b -> b
  | v -> internal (sprintf "Failure(\"Expected bool, got '%s'\")" (XmlRpc.dump v))

let members : value -> (string * value) list = function
  | `Struct l -> l
  | v -> internal (sprintf "Failure(\"Expected struct, got '%s'\")" (XmlRpc.dump v))

let dict v = List.map (fun (k, v) -> (k, text v)) (members v)

let required l name =
  match List.assoc_opt name l with
  | Some v -> v
  | None -> internal (sprintf "Server_helpers.Dispatcher_FieldNotFound(%S)" name)

let one_of l v = if List.mem v l then v else internal "Failure(\"Unknown tag/contents\")"

(* {1 Calls} *)

(* The lowest number that no VBD of the control domain has. *)
let free_userdevice () =
  let taken = List.map (fun (_, b) -> b.userdevice) (vbds_where (fun _ -> true)) in
  let rec lowest n = if List.mem n taken then lowest (n + 1) else n in
  lowest 0

(* Like every call it reads its parameters before it checks the session. *)
let create_vbd v =
  let l = members v in
  let string_of name = text (required l name) in
  let vm = string_of "VM" and vdi = string_of "VDI" in
  let userdevice = string_of "userdevice" in
  ignore (flag (required l "bootable"));
  let mode = one_of [ "RO"; "RW" ] (string_of "mode") in
  let vbd_type = one_of [ "CD"; "Disk"; "Floppy" ] (string_of "type") in
  ignore (flag (required l "empty"));
  let config = dict (required l "other_config") in
  ignore (string_of "qos_algorithm_type");
  ignore (dict (required l "qos_algorithm_params"));
  fun () ->
    if vm <> dom0 then handle_invalid "VM" vm;
    let vdi = vdi_of_ref vdi in
    if vdi.shown_type <> "" then fail "VDI_INCOMPATIBLE_TYPE" [ vdi.vdi_ref; vdi.shown_type ];
    if userdevice <> "autodetect" then fail "INVALID_DEVICE" [ userdevice ];
    let r = new_ref () in
    Hashtbl.replace vbds r
      { vbd_uuid = uuid (); vm; vdi; userdevice = free_userdevice (); mode; vbd_type; config;
        device = ""; attached = false };
    str r

let plug r =
  let b = vbd_of_ref r in
  if b.attached then fail "DEVICE_ALREADY_ATTACHED" [ r ];
  match b.vdi.on_plug b.vdi.vdi_ref r with
  | code :: params -> fail code params
  | [] ->
      b.device <- sprintf "sm/backend/%s/%s" sr_uuid b.vdi.vdi_uuid;
      b.attached <- true

let unplug r =
  let b = vbd_of_ref r in
  if not b.attached then fail "DEVICE_ALREADY_DETACHED" [ r ];
  b.attached <- false

let destroy r =
  let b = vbd_of_ref r in
  if b.attached then
    fail "OPERATION_NOT_ALLOWED"
      [ sprintf "VBD '%s' still attached to '%s'" b.vbd_uuid dom0_uuid ];
  Hashtbl.remove vbds r

(* The one question of the filter language that a client of ours has. *)
let vbds_where_text expr =
  match Scanf.sscanf expr "field \"VM\"=\"%[^\"]\"%!" Fun.id with
  | vm -> `Struct (List.map (fun (r, b) -> (r, vbd_record b)) (vbds_where (fun b -> b.vm = vm)))
  | exception _ -> fail "INVALID_VALUE" [ expr; "not understood" ]

type call = {
  args : int; (* besides the session *)
  permission : string; (* "" for what everybody may do *)
  read : value list -> string -> unit -> value; (* parameters, session, then the work *)
}

let getter f = { args = 1; permission = ""; read = (fun l -> let a = text (List.hd l) in fun _ () -> f a) }

let action permission f =
  let run a () = f a; str "" in
  { args = 1; permission; read = (fun l -> let a = text (List.hd l) in fun _ -> run a) }

let by_uuid cls find =
  getter (fun uuid -> match find uuid with Some r -> str r | None -> fail "UUID_INVALID" [ cls; uuid ])

let own_session f =
  getter (fun r ->
      match Hashtbl.find_opt sessions r with
      | Some s -> f s
      | None -> handle_invalid "session" r)

let logout session () =
  Hashtbl.remove sessions session;
  str ""

let calls =
  [
    ("session.logout", { args = 0; permission = ""; read = (fun _ -> logout) });
    ("session.get_uuid", own_session (fun s -> str s.session_uuid));
    ("session.get_record", own_session session_record);
    ("network.get_all_records", { args = 0; permission = ""; read = (fun _ _ () -> networks) });
    ("VM.get_by_uuid", by_uuid "VM" (fun u -> if u = dom0_uuid then Some dom0 else None));
    ( "VDI.get_by_uuid",
      by_uuid "VDI" (fun u ->
          Option.map (fun (_, v) -> v.vdi_ref) (List.find_opt (fun (_, v) -> v.vdi_uuid = u) vdis)) );
    ("VDI.get_record", getter (fun r -> vdi_record (vdi_of_ref r)));
    ( "VBD.create",
      { args = 1; permission = "vbd.create"; read = (fun l -> let run = create_vbd (List.hd l) in fun _ -> run) } );
    ("VBD.plug", action "vbd.plug" plug);
    ("VBD.unplug", action "vbd.unplug" unplug);
    ("VBD.destroy", action "vbd.destroy" destroy);
    ( "VBD.get_by_uuid",
      by_uuid "VBD" (fun u ->
          match vbds_where (fun b -> b.vbd_uuid = u) with [] -> None | (r, _) :: _ -> Some r) );
    ("VBD.get_uuid", getter (fun r -> str (vbd_of_ref r).vbd_uuid));
    ("VBD.get_record", getter (fun r -> vbd_record (vbd_of_ref r)));
    ("VBD.get_all_records_where", getter vbds_where_text);
  ]

let check_permission session permission =
  match (session_of_ref session).permissions with
  | Some allowed when permission <> "" && not (List.mem permission allowed) ->
      fail "RBAC_PERMISSION_DENIED" [ permission; "No permission in user session." ]
  | _ -> ()

(* In xapi's order: the method, the number of parameters, their types, the
   session, its role, and then what the call is about. *)
let dispatch name params =
  match (name, params, List.assoc_opt name calls) with
  | "session.login_with_password", ([ _; _ ] | [ _; _; _ ]), _ ->
      List.iter (fun p -> ignore (text p)) params;
      str (new_session "" None)
  | "session.login_with_password", [ _; _; _; originator ], _ ->
      List.iter (fun p -> ignore (text p)) params;
      str (new_session (text originator) None)
  | _, session :: args, Some c when List.length args = c.args ->
      let work = c.read args in
      let session = text session in
      check_permission session c.permission;
      work session ()
  | _, _, Some c ->
      let count n = string_of_int n in
      fail "MESSAGE_PARAMETER_COUNT_MISMATCH" [ name; count c.args; count (List.length params - 1) ]
  | _, _, None -> fail "MESSAGE_METHOD_UNKNOWN" [ name ]

(* How many more calls find a host that is still starting. *)
let booting = ref 0

(* The answer to a call, in the struct that xapi puts around every one. *)
let answer name params : value =
  match
    if !booting > 0 then begin
      decr booting;
      fail "HOST_STILL_BOOTING" []
    end;
    dispatch name params
  with
  | v -> `Struct [ ("Status", str "Success"); ("Value", v) ]
  | exception Failed description ->
      `Struct [ ("Status", str "Failure"); ("ErrorDescription", set description) ]

(* {1 The wire} *)

let escape s =
  let b = Buffer.create (String.length s) in
  let add = function
    | '<' -> Buffer.add_string b "&lt;"
    | '>' -> Buffer.add_string b "&gt;"
    | '&' -> Buffer.add_string b "&amp;"
    | '"' -> Buffer.add_string b "&quot;"
    | '\t' | '\n' | '\r' as c -> Buffer.add_char b c
    | c -> if c >= ' ' then Buffer.add_char b c
  in
  String.iter add s;
  Buffer.contents b

(* A value as xapi writes it: no type around strings and integers, names of
   members as they are. *)
let rec untyped (v : value) =
  let text =
    match v with
    | `String s -> escape s
    | `Int i -> string_of_int i
    | `Int32 i -> Int32.to_string i
    | `Boolean b -> sprintf "<boolean>%d</boolean>" (Bool.to_int b)
    | `Double d -> sprintf "<double>%.16g</double>" d
    | `DateTime (y, m, d, hour, min, sec, _) ->
        sprintf "<dateTime.iso8601>%04d%02d%02dT%02d:%02d:%02dZ</dateTime.iso8601>" y m d hour min sec
    | `Nil -> "<nil/>"
    | `Binary _ -> invalid_arg "xapi has no binary values"
    | `Array l -> "<array><data>" ^ String.concat "" (List.map untyped l) ^ "</data></array>"
    | `Struct l -> "<struct>" ^ String.concat "" (List.map member l) ^ "</struct>"
  in
  "<value>" ^ text ^ "</value>"

and member (name, v) = "<member><name>" ^ name ^ "</name>" ^ untyped v ^ "</member>"

let declaration = {|<?xml version="1.0"?>|}

(* Raises the exceptions of the XML and XML-RPC parsers on a malformed body. *)
let reply wire body =
  if wire = "typed" then
    declaration ^ XmlRpc.serve ~error_handler:XmlRpc.quiet_error_handler answer body
  else
    match XmlRpc.message_of_xml_element (Xml.parse_string body) with
    | XmlRpc.MethodCall (name, params) ->
        sprintf "%s<methodResponse><params><param>%s</param></params></methodResponse>" declaration
          (untyped (answer name params))
    | _ -> failwith "not a call"

let response status kind extra body =
  sprintf
    "HTTP/1.1 %s\r\ncontent-length: %d\r\nconnection: close\r\ncache-control: no-cache, no-store\r\ncontent-type: \
     %s\r\n%s\r\n%s"
    status (String.length body) kind extra body

let access =
  "Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Headers: X-Requested-With\r\n"

let max_header = 1024 (* bytes that xapi reads of a header on this socket *)
let max_body = 300 * 1024

(* The length of the body, from a header whose lines are read to the empty one. *)
let rec content_length ic room found =
  let line = input_line ic in
  let room = room - String.length line - 1 in
  if room < 0 then failwith "the header is too long";
  match String.index_opt line ':' with
  | _ when line = "\r" -> found
  | Some i when String.lowercase_ascii (String.sub line 0 i) = "content-length" ->
      let rest = String.sub line (i + 1) (String.length line - i - 1) in
      content_length ic room (int_of_string_opt (String.trim rest))
  | _ -> content_length ic room found

let respond wire ic =
  let first = input_line ic in
  if not (String.length first > 5 && String.sub first 0 5 = "POST ") then failwith "not a POST";
  match content_length ic (max_header - String.length first - 1) None with
  | Some n when n >= 0 && n <= max_body ->
      response "200 OK" "text/xml" access (reply wire (really_input_string ic n))
  | _ -> failwith "no usable content-length"

(* One call per connection: "connection: close" is always the answer. *)
let serve wire fd =
  let ic = Unix.in_channel_of_descr fd and oc = Unix.out_channel_of_descr fd in
  (match respond wire ic with
  | text -> output_string oc text
  | exception End_of_file -> () (* the peer has left *)
  | exception e ->
      let body = "<html><body><h1>HTTP 500 internal server error</h1></body></html>" in
      prerr_endline ("refused a request: " ^ Printexc.to_string e);
      output_string oc (response "500 Internal Error" "text/html" "" body));
  try close_out oc with Sys_error _ -> close_out_noerr oc

let rec accept wire listener =
  match Unix.select [ listener; Unix.stdin ] [] [] (-1.) with
  | ready, _, _ when List.mem Unix.stdin ready -> ()
  | _ ->
      let fd, _ = Unix.accept listener in
      serve wire fd;
      accept wire listener

(* The permissions of clients that do not have all. *)
let read_only = [ "session.get_record"; "vdi.get_record"; "network.get_all_records" ]

let () =
  let socket = Sys.argv.(1) and wire = Sys.argv.(2) in
  booting := int_of_string Sys.argv.(3);
  Random.self_init ();
  Sys.set_signal Sys.sigpipe Sys.Signal_ignore;
  let listener = Unix.socket Unix.PF_UNIX Unix.SOCK_STREAM 0 in
  Unix.bind listener (Unix.ADDR_UNIX socket);
  Unix.listen listener 128;
  printf "peer XmlRpc-Light %s, OCaml %s\n" XmlRpc.version Sys.ocaml_version;
  printf "dom0 %s\nsr %s\nread-only %s\n" dom0_uuid sr (new_session "" (Some read_only));
  List.iter (fun (name, v) -> printf "%s %s\n%s-ref %s\n" name v.vdi_uuid name v.vdi_ref) vdis;
  printf "ready\n%!";
  accept wire listener;
  Unix.unlink socket
